"""No command overwrites what is there unless `--force` says so, and then only by what is complete."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters import kohya, randn, write
from tests.conftest import ROOT
from tests.lora.commands.running import run

MODEL = ROOT / "demo" / "model"
STEM = "diffusion_model.blocks.{}"


@pytest.fixture
def inputs(tmp_path: Path) -> Mapping[str, str]:
    """Two models and two LoRAs of the first, in a folder of their own."""
    folder = tmp_path / "in"
    folder.mkdir()
    base = {f"blocks.{n}.weight": randn(40, 40, seed=n) for n in range(2)}
    tuned = {name: tensor + 0.1 * randn(40, 1) @ randn(1, 40) for name, tensor in base.items()}
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    for name in ("one", "two"):
        lora = {
            f"{STEM.format(n)}.{part}.weight": randn(*shape, seed=n)
            for n in range(2)
            for part, shape in (("lora_down", (4, 40)), ("lora_up", (40, 4)))
        }
        write(folder / f"{name}.safetensors", lora)
    names = ("base", "tuned", "one", "two")
    return {name: str(folder / f"{name}.safetensors") for name in names}


LINES = {
    "resize": "resize {one} --rank 2",
    "convert": "convert {one}",
    "combine": "combine {one} {two}",
    "merge": "merge --source-model {base} --lora-model {one}",
    "extract": "extract --source-model {base} --target-model {tuned} --rank 2",
}
"""Each command that writes a file, without its output."""


def line_of(command: str, inputs: Mapping[str, str]) -> list[str]:
    return [word.format(**inputs) for word in LINES[command].split()]


def state(folder: Path) -> dict[str, bytes]:
    return {str(one): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


@pytest.mark.parametrize("command", LINES)
@pytest.mark.parametrize("there", ["file", "folder", "dead link", "input", "link", "spelling"])
def test_what_is_there_is_left_as_it_is(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    inputs: Mapping[str, str],
    command: str,
    there: str,
) -> None:
    output = tmp_path / "out.safetensors"
    source = Path(inputs["base" if command in ("merge", "extract") else "one"])
    if there == "file":
        output.write_bytes(b"mine")
    elif there == "folder":
        output.mkdir()
        (output / "mine").touch()
    elif there == "dead link":
        output.symlink_to(tmp_path / "nowhere")
    elif there == "link":
        output.symlink_to(source)
    else:
        output = source if there == "input" else tmp_path / "in" / ".." / "in" / source.name
    before = state(tmp_path)
    ran = run(capsys, *line_of(command, inputs), "--output", output)
    assert (ran.code, ran.out) == (2, "")
    hint = "Name another output, or overwrite it with --force."
    assert ran.err == f"error: TOOL_ERROR: the output {output} exists already. {hint}\n"
    assert state(tmp_path) == before
    assert there != "dead link" or output.is_symlink()


@pytest.mark.parametrize("command", LINES)
def test_the_refusal_comes_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    nothing = dict.fromkeys(("base", "tuned", "one", "two"), str(tmp_path / "nothing"))
    (tmp_path / "out").touch()
    ran = run(capsys, *line_of(command, nothing), "--output", tmp_path / "out")
    assert f"the output {tmp_path / 'out'} exists already" in ran.err


@pytest.mark.parametrize("command", LINES)
def test_with_force_the_new_file_is_what_it_would_be_elsewhere(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, inputs: Mapping[str, str], command: str
) -> None:
    """Be it in the place of another file, or of the input; a link is replaced, not what it leads to."""
    new = tmp_path / "new.safetensors"
    assert run(capsys, *line_of(command, inputs), "--output", new).code == 0
    mine, link = tmp_path / "mine.safetensors", tmp_path / "link.safetensors"
    mine.write_bytes(b"mine")
    link.symlink_to(mine)
    source = Path(inputs["base" if command in ("merge", "extract") else "one"])
    for output in (link, mine, source):
        ran = run(capsys, *line_of(command, inputs), "--output", output, "--force")
        assert ran.code == 0, ran.err
        assert not output.is_symlink()
        found, expected = load_file(output), load_file(new)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert output != link or mine.read_bytes() == b"mine"
    assert not [one for one in tmp_path.rglob(".*") if one.name.endswith((".part", ".journal"))]


@pytest.mark.parametrize("command", ["resize", "convert", "combine", "merge"])
def test_what_fails_leaves_the_old_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, inputs: Mapping[str, str], command: str
) -> None:
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"mine")
    save_file({"nothing.that.is.known": randn(2)}, inputs["one"])
    ran = run(capsys, *line_of(command, inputs), "--output", output, "--force")
    assert ran.code == 2
    assert [one.name for one in tmp_path.iterdir() if one.name != "in"] == ["out.safetensors"]
    assert output.read_bytes() == b"mine"


def test_a_peft_folder_is_replaced_by_its_like(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lora, folder = write(tmp_path / "a.safetensors", kohya()), tmp_path / "peft"
    line = ("convert", lora, "--naming", "peft", "--output", folder)
    model = ("--model", MODEL)
    assert run(capsys, *line, *model).code == 0
    first = state(folder)
    assert len(first) == 2
    assert "exists already" in run(capsys, *line, *model).err
    (folder / "adapter_model.safetensors").write_bytes(b"old")
    assert run(capsys, *line, *model, "--force").code == 0
    assert state(folder) == first
    again = ("resize", folder, "--rank", 2, "--output", folder, "--force")
    assert run(capsys, *again).code == 0  # the input itself
    assert state(folder).keys() == first.keys()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.safetensors", "peft"]


def test_a_folder_with_anything_else_in_it_is_not_replaced(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, inputs: Mapping[str, str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "adapter_config.json").touch()
    (folder / "notes.txt").write_text("mine")
    for command in LINES:
        ran = run(capsys, *line_of(command, inputs), "--output", folder, "--force")
        assert ran.code == 2, command
        assert (folder / "notes.txt").read_text() == "mine"
    ran = run(capsys, *line_of("resize", inputs), "--output", folder, "--force")
    said = f"overwriting the folder {folder} would remove {folder / 'notes.txt'}"
    assert said in ran.err


def test_a_models_folder_is_replaced_by_the_same_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, inputs: Mapping[str, str]
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    Path(inputs["base"]).rename(model / "model.safetensors")
    (model / "config.json").write_text("{}")
    line = ("merge", "--source-model", model, "--lora-model", inputs["one"], "--output")
    assert run(capsys, *line, out).code == 0
    assert "exists already" in run(capsys, *line, out).err
    first = state(out)
    (out / "config.json").unlink()
    (out / "model.safetensors").write_bytes(b"old")
    assert run(capsys, *line, out, "--force").code == 0
    assert state(out) == first
    assert run(capsys, *line, model, "--force").code == 0  # the input itself
    assert load_file(model / "model.safetensors").keys() == {f"blocks.{n}.weight" for n in (0, 1)}
    assert (model / "config.json").read_text() == "{}"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["in", "model", "out"]


def test_a_file_of_an_input_of_several_is_never_replaced_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, inputs: Mapping[str, str]
) -> None:
    peft = tmp_path / "peft"
    line = ("convert", write(tmp_path / "a.safetensors", kohya()), "--model", MODEL)
    assert run(capsys, *line, "--naming", "peft", "--output", peft).code == 0
    before = state(peft)
    line = ("resize", peft, "--rank", 2, "--naming", "kohya", "--model", MODEL)
    ran = run(capsys, *line, "--output", peft / "adapter_model.safetensors", "--force")
    assert (ran.code, "is one of the files of an input" in ran.err) == (2, True)
    assert state(peft) == before


def test_what_is_neither_file_nor_folder_stays(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, inputs: Mapping[str, str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    ran = run(capsys, *line_of("resize", inputs), "--output", tmp_path / "pipe", "--force")
    assert "neither a file nor a folder" in ran.err
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_and_a_folder_do_not_replace_each_other(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, inputs: Mapping[str, str]
) -> None:
    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").touch()
    ran = run(capsys, *line_of("resize", inputs), "--output", peft, "--force")
    assert "is a folder, and the result is a file" in ran.err
    (tmp_path / "file").touch()
    ran = run(capsys, *line_of("merge", inputs), "--output", tmp_path / "file", "--force")
    assert "is a file, and the result is a folder" in ran.err


def test_an_empty_folder_is_as_good_as_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, inputs: Mapping[str, str]
) -> None:
    (tmp_path / "out").mkdir()
    assert run(capsys, *line_of("merge", inputs), "--output", tmp_path / "out").code == 0
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["base.safetensors"]


def test_a_plot_is_not_overwritten_either(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, inputs: Mapping[str, str]
) -> None:
    plot = tmp_path / "plot.svg"
    plot.write_text("mine")
    line = ("inspect", inputs["one"], "--plot", plot)
    ran = run(capsys, *line)
    assert (ran.code, ran.out) == (2, "")
    assert f"the output {plot} exists already" in ran.err
    assert plot.read_text() == "mine"
    assert run(capsys, *line, "--force").code == 0
    assert "<svg" in plot.read_text()
