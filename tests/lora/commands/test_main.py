"""The command line as a whole: help, exit codes, where output goes."""

from __future__ import annotations

import os
import pty
import shlex
import signal
import subprocess
import sys
import termios
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora.__main__ import COMMANDS
from lora.commands.shared import byte_count, plain, size, table, with_scale, write_file
from lora.errors import ToolError
from tests.adapters import kohya, randn, write
from tests.conftest import ROOT
from tests.lora.commands.running import run, start
from tests.waiting import PATIENCE, until


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['lora', 'extract', '--help']\n"
        "from lora.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--source-model" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_takes_json(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    ran = run(capsys, name, "--help")
    assert ran.code == 0
    assert COMMANDS[name].SUMMARY[1:20] in ran.out
    assert "--json" in ran.out


def test_every_example_of_the_help_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, in a folder beside the demo; `extract` takes what `merge` has written."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("inspect", "merge", *(COMMANDS.keys() - {"inspect", "merge"})):
        shown = run(capsys, name, "--help").out
        line = shown.rpartition("python -m lora ")[2]
        assert line.split()[0] == name
        ran = run(capsys, *shlex.split(line))
        assert (ran.code, ran.err) == (0, ""), name
        assert ran.out


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("merge",), ("inspect",)])
def test_arguments_that_do_not_do_exit_with_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    ran = run(capsys, *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "error:" in ran.err


def test_generate_is_listed_and_needs_the_workers_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "worker", None)
    monkeypatch.delitem(sys.modules, "worker.generate", raising=False)
    assert "generate" in run(capsys, "--help").out
    ran = run(capsys, "generate", "--prompt", "a circle", "--out", "nowhere")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: TOOL_ERROR: `generate` works with the worker")
    assert ran.err.count("\n") == 1


class Loud:
    """A command whose library prints, and part of which fails."""

    SUMMARY = "loud"
    EXAMPLE = "loud"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--fail", action="store_true")

    def run(self, options: Namespace) -> Mapping[str, Any]:
        print("noise")
        if options.fail:
            raise ZeroDivisionError
        return {"one": 1, "errors": ["CODE: a part failed."]}

    def show(self, result: Mapping[str, Any]) -> str:
        return f"one is {result['one']}"


@pytest.fixture
def loud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "loud", Loud())  # type: ignore[arg-type]


def test_stdout_is_the_results_alone_whatever_prints(
    capsys: pytest.CaptureFixture[str], loud: None
) -> None:
    ran = run(capsys, "loud")
    assert (ran.code, ran.out) == (2, "one is 1\n")
    assert ran.err == "noise\nerror: CODE: a part failed.\n"
    assert run(capsys, "loud", "--json").json == {"one": 1, "errors": ["CODE: a part failed."]}


def test_what_nobody_foresaw_is_not_hidden(capsys: pytest.CaptureFixture[str], loud: None) -> None:
    with pytest.raises(ZeroDivisionError):  # which Python tells with a traceback, and exits with 1
        run(capsys, "loud", "--fail")


def test_a_fault_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ran = run(
        capsys, "resize", tmp_path / "nothing.safetensors", "--rank", 2, "--output", tmp_path / "x"
    )
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: LORA_NOT_FOUND: ")
    assert ran.err.count("\n") == 1


def test_a_files_text_cannot_move_the_cursor_in_an_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.safetensors", {**kohya(), "\x1b[31mevil\x07": randn(1)})
    ran = run(capsys, "resize", path, "--rank", 2, "--output", tmp_path / "b.safetensors")
    assert ran.code == 2
    assert "evil" in ran.err
    assert "\x1b" not in ran.err
    assert "\x07" not in ran.err


def test_an_unreadable_file_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "a.safetensors"
    folder.mkdir()
    ran = run(
        capsys,
        "merge",
        "--source-model",
        folder,
        "--lora-model",
        folder,
        "--output",
        tmp_path / "o",
    )
    assert ran.code == 2
    assert ran.err.startswith("error: ")


def test_an_interrupt_exits_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    model = {f"blocks.{n}.weight": randn(1500, 1500, seed=n) for n in range(16)}
    save_file(model, tmp_path / "a.safetensors")
    output = tmp_path / "merged.safetensors"
    lora = {f"diffusion_model.blocks.{n}.diff": randn(1500, 1500) for n in range(16)}
    save_file(lora, tmp_path / "lora.safetensors")
    running = start(
        *("merge", "--source-model", tmp_path / "a.safetensors"),
        *("--lora-model", tmp_path / "lora.safetensors", "--output", output),
    )
    known = {"a.safetensors", "lora.safetensors"}
    until(lambda: {one.name for one in tmp_path.iterdir()} - known, pause=0.001)
    os.kill(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=PATIENCE)
    left = {one.name for one in tmp_path.iterdir()} - known
    assert (running.returncode, left, out) == (130, set(), ""), err
    assert err == "interrupted\n"


def test_a_bar_is_shown_on_a_terminal_alone(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    line = [
        sys.executable,
        "-m",
        "lora",
        "inspect",
        str(write(tmp_path / "a.safetensors", kohya())),
    ]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs) as running:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # the terminal's end
            while piece := os.read(ours, 1000):
                shown += piece
        os.close(ours)
        out, _ = running.communicate()
    assert running.returncode == 0
    assert b"a.safetensors" in shown
    assert b"%|" in shown
    without = subprocess.run(line, cwd=ROOT, capture_output=True, check=False)
    assert (without.stderr, without.stdout) == (b"", out)


def test_a_reader_that_goes_early_is_no_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", kohya())
    command = f"{sys.executable} -m lora inspect {' '.join([str(path)] * 3)} --json | head -c 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "{"
    assert done.stderr == ""


def test_a_terminal_without_unicode_gets_plain_letters(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", kohya(), {"ss_output_name": "naïve"})
    running = start("inspect", path, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    out, err = running.communicate(timeout=PATIENCE)
    assert running.returncode == 0, err
    assert "####" in out
    assert "na?ve" in out


# --- what commands share ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "source", "scale"),
    [
        ("a.safetensors", "a.safetensors", None),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("a:.5", "a", 0.5),
        ("civitai:123", "civitai:123", None),
        ("civitai:123:0.5", "civitai:123", 0.5),
        ("civitai:123@456:2", "civitai:123@456", 2.0),
        ("urn:air:sdxl:lora:civitai:1@2", "urn:air:sdxl:lora:civitai:1@2", None),
        ("https://host/a.safetensors:0.5", "https://host/a.safetensors", 0.5),
        ("user/repo:1e-1", "user/repo", 0.1),
        ("user/repo:nan", "user/repo:nan", None),
        (":0.5", ":0.5", None),
    ],
)
def test_a_source_and_its_scale(text: str, source: str, scale: float | None) -> None:
    assert with_scale(text) == (source, scale)


def test_a_file_whose_name_ends_in_a_number_has_no_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:2").touch()
    assert with_scale("a:2") == ("a:2", None)
    assert with_scale("a:2:0.5") == ("a:2", 0.5)


def test_bytes_are_read_and_told() -> None:
    assert [byte_count(text) for text in ("12", "60M", "1.5g", "3k")] == [
        12,
        60_000_000,
        1_500_000_000,
        3000,
    ]
    assert [size(n) for n in (12, 1234, 5_600_000, 7e9)] == ["12 B", "1.23 kB", "5.6 MB", "7 GB"]


def test_columns_are_as_wide_as_their_longest() -> None:
    assert table([("a", "1"), ("bcd", "22")]) == ["a     1", "bcd  22"]
    assert table([]) == []


def test_results_are_plain_values() -> None:
    assert plain({"a": (Path("x"), torch.float16, None, True)}) == {
        "a": ["x", "torch.float16", None, True]
    }


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"1")
    write_file(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"2"
    with pytest.raises(ToolError):
        write_file(tmp_path / "nothing" / "a", b"1")
    assert [one.name for one in tmp_path.iterdir()] == ["a"]
