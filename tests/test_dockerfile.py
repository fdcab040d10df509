"""The Dockerfile at its word: each stage copies what it runs, as far as that needs no network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT
from tests.waiting import PATIENCE


class Stage(NamedTuple):
    """A stage: what it starts from, and its instructions, each a word and the rest of its line."""

    base: str
    lines: list[tuple[str, str]]


def stages() -> dict[str, Stage]:
    """The stages by their names; the last, which `docker build .` makes, is named `last` if nothing else."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: dict[str, Stage] = {}
    for line in filter(None, text.replace("\\\n", " ").splitlines()):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name or "last"] = stage = Stage(base, [])
        elif found:
            stage.lines.append((word, rest))
    return found


STAGES = stages()


def lines_of(name: str) -> list[tuple[str, str]]:
    """A stage's instructions after those of the stages that it starts from."""
    stage = STAGES[name]
    return [*(lines_of(stage.base) if stage.base in STAGES else []), *stage.lines]


def copied(name: str, folder: Path) -> Path:
    """What the stage's COPY lines name, in an empty folder."""
    for word, rest in lines_of(name):
        if word == "COPY" and "--from" not in rest:
            *sources, target = rest.split()
            for source in sources:
                into = folder / target
                if (ROOT / source).is_dir():
                    shutil.copytree(
                        ROOT / source, into, ignore=shutil.ignore_patterns("__pycache__")
                    )
                else:
                    into.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, into)
    return folder


def commands(name: str) -> list[str]:
    """The shell's commands of the stage's own RUN lines."""
    runs = [rest for word, rest in STAGES[name].lines if word == "RUN"]
    return [
        part.strip() for run in runs for part in re.split("&&|;", re.sub(r"--mount=\S+", "", run))
    ]


def run(folder: Path, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the folder, which knows nothing of this repository and its settings."""
    own = {
        name: text
        for name, text in os.environ.items()
        if name not in ("PYTHONPATH", "LORA_CACHE_DIR")
    }
    return subprocess.run(
        [sys.executable if command[0] == "python" else command[0], *command[1:]],
        cwd=folder,
        env={**own, "WORKER_MODEL": "demo", "HF_HOME": str(folder / "empty"), **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def test_every_command_of_a_run_line_is_known() -> None:
    found = [command for name in STAGES for command in commands(name)]
    known = "pip install|python download_weights.py|HF_HUB_OFFLINE=1 python|mkdir|chown|useradd|if|fi|then"
    assert [command for command in found if not re.match(known, command)] == []


def test_the_packages_are_those_that_are_tested(tmp_path: Path) -> None:
    folder = copied("packages", tmp_path)
    assert [command for command in commands("packages") if "-r requirements.txt" in command]
    done = run(
        folder,
        "python",
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-index",
        "-r",
        "requirements.txt",
    )
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout


def test_the_weights_stage_runs_on_what_it_copies_and_copies_little(tmp_path: Path) -> None:
    folder = copied("weights", tmp_path)
    programs = [file for file in folder.rglob("*.py") if file.name != "__init__.py"]
    assert len(programs) == 5
    for command in commands("weights"):
        if words := re.findall(r"python (download_weights.py.*)", command):
            done = run(folder, "python", *words[0].split())
            assert done.returncode == 0, done.stderr
    done = run(folder, "python", "download_weights.py", "--check", WORKER_MODEL="someone/model")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert done.stderr.startswith("someone/model is neither a folder or file here nor a repo in")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slim", "last"])
def test_the_image_draws_with_what_it_copies(name: str, tmp_path: Path) -> None:
    folder = copied(name, tmp_path / "app")
    command = json.loads(next(rest for word, rest in lines_of(name) if word == "CMD"))
    job = json.dumps(
        {"input": {"prompt": "a", "num_inference_steps": 1, "loras": ["demo-stripes"]}}
    )
    cache = str(tmp_path / "loras")
    done = run(folder, *command, "--test_input", job, LORA_CACHE_DIR=cache, WORKER_DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    assert "'status': 'applied'" in done.stdout + done.stderr


def test_the_image_with_weights_takes_them_from_the_stage_that_fetched_them() -> None:
    own = [rest for word, rest in STAGES["last"].lines if word == "COPY"]
    assert own == ["--link --from=weights /models/huggingface /models/huggingface"]
    assert STAGES["last"].base == "slim"
    assert not [
        rest for word, rest in lines_of("slim") if "download_weights.py" in rest and word == "RUN"
    ]
