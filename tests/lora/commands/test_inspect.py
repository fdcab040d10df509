"""`inspect`: what a person sees, what a program reads, and files that cannot be read."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora.commands.charts import Bar, text_bars
from tests.adapters import kohya, randn, sd15, write
from tests.conftest import ROOT
from tests.lora.commands.running import run

STRIPES = ROOT / "demo" / "loras" / "demo-stripes.safetensors"
MODEL = ROOT / "demo" / "model"


def test_a_person_is_told_what_the_file_is(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run(capsys, "inspect", STRIPES)
    assert (ran.code, ran.err) == (0, "")
    for words in (
        "algorithm: lora (230 modules)",
        "layout: kohya, SGM names (690 tensors)",
        "base model: SDXL",
        "trigger words: stripes",
        "rank 8, alpha 4, scaling 0.5",
        "AutoV2 (Civitai): e4dbbf4ee1",
        "unet OUT05",
    ):
        assert words in ran.out
    assert "█" in ran.out


def test_json_has_the_whole_and_stdout_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "inspect", STRIPES, "--json").json
    (one,) = found["files"]
    assert found["errors"] == []
    assert one["algorithms"] == {"lora": 230}
    assert one["components"]["unet"]["scaling"] == {"least": 0.5, "most": 0.5, "usual": 0.5}
    assert one["hashes"]["sha256"].startswith("e4dbbf4ee1")
    assert len(one["norms"]) == 18
    assert one["fit"] is None


def test_a_fault_in_one_file_is_told_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.safetensors"
    page.write_text("<!doctype html><p>log in")
    good = write(tmp_path / "good.safetensors", kohya())
    torch.save(kohya(), tmp_path / "good.pt")
    ran = run(capsys, "inspect", page, good, tmp_path / "none", tmp_path / "good.pt")
    assert ran.code == 2
    assert ran.out.count("algorithm: lora (3 modules)") == 2
    errors = ran.err.splitlines()
    assert [line.split(":")[1].strip() for line in errors] == ["LORA_CORRUPT", "LORA_NOT_FOUND"]
    assert str(page) in errors[0]
    assert str(tmp_path / "none") in errors[1]


def test_against_a_model_matched_and_unmatched_are_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ran = run(capsys, "inspect", STRIPES, "--against", MODEL)
    assert "fits the model: 690 tensors matched, on 230 modules" in ran.out
    tensors = {f"lora_unet_nothing_{n}.diff": randn(2) for n in range(30)}
    says_so = {"ss_base_model_version": "sdxl_base_v1-0"}
    path = write(tmp_path / "a.safetensors", {**kohya(), **tensors}, says_so)
    ran = run(capsys, "inspect", path, "--against", MODEL)
    assert "unmatched: 30 tensors" in ran.out
    assert "and 10 more" in ran.out
    found = run(capsys, "inspect", path, "--against", MODEL, "--json").json["files"][0]["fit"]
    assert {one["key"] for one in found["keys"]} == set(tensors)


def test_a_file_for_another_model_does_not_fit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.safetensors", sd15())
    ran = run(capsys, "inspect", path, "--against", MODEL)
    assert ran.code == 0
    assert "does not fit the model: the file was made for SD 1.5" in ran.out


def test_against_sdxl_needs_no_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    tensors = {
        f"{stem}.lora_down.weight": randn(2, 2048),
        f"{stem}.lora_up.weight": randn(640, 2),
        f"{stem}.alpha": torch.tensor(1.0),
    }
    path = write(tmp_path / "a.safetensors", tensors)
    ran = run(capsys, "inspect", path, "--against", "sdxl")
    assert "fits the model: 3 tensors matched, on 1 modules" in ran.out


def test_a_model_that_cannot_be_opened_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ran = run(capsys, "inspect", STRIPES, "--against", tmp_path / "nothing")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: TOOL_ERROR")


def test_the_plot_is_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(capsys, "inspect", STRIPES, "--plot", tmp_path / "a.png").code == 0
    picture = Image.open(io.BytesIO((tmp_path / "a.png").read_bytes())).convert("RGB")
    assert picture.width > 500
    assert (47, 111, 176) in {color for _, color in picture.getcolors(1 << 24) or ()}
    assert run(capsys, "inspect", STRIPES, "--plot", tmp_path / "a.svg").code == 0
    svg = (tmp_path / "a.svg").read_text()
    assert svg.count("<rect") == 19
    assert "unet OUT05" in svg
    assert {one.name for one in tmp_path.iterdir()} == {"a.png", "a.svg"}


def test_a_plot_of_another_kind_or_of_many_files_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(capsys, "inspect", STRIPES, "--plot", tmp_path / "a.gif").code == 2
    assert run(capsys, "inspect", STRIPES, STRIPES, "--plot", tmp_path / "a.png").code == 2
    assert list(tmp_path.iterdir()) == []


def test_texts_of_a_stranger_are_shown_without_their_controls(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    metadata = {
        "ss_output_name": "\x1b]0;owned\x07",
        "ss_tag_frequency": json.dumps({"a": {"\x1b[2Jword": 3}}),
    }
    tensors = {**kohya(), "\x9b31mkey": randn(1)}
    ran = run(capsys, "inspect", write(tmp_path / "a.safetensors", tensors, metadata))
    assert "[2Jword (3)" in ran.out
    assert "31mkey" in ran.out
    assert all(letter.isprintable() or letter == "\n" for letter in ran.out)


def test_bars_are_as_long_as_their_values() -> None:
    bars = [Bar("a", 4.0, "x"), Bar("bb", 2.0), Bar("c", 0.0)]
    lines = text_bars(bars, 40, unicode=True)
    assert [line.count("█") for line in lines] == [30, 15, 0]
    assert max(map(len, lines)) <= 40
    assert [line.count("#") for line in text_bars(bars, 40, unicode=False)] == [30, 15, 0]
    assert text_bars([], 40, unicode=True) == []
    assert text_bars([Bar("a", 0.0)], 1, unicode=True)
