"""How long a worker takes until it is ready, from a fresh process on: `python -m benchmarks.start [BEFORE]`.

    python -m benchmarks.start [BEFORE] [--model build/sdxl-random] [--rounds 3]

Side by side, one after the other in each round: importing torch, importing the handler, the worker's whole
start (`python handler.py` with one `health` job, the SDK included), the same of the commit BEFORE, a plain
script with diffusers that loads the same pipeline, and `cat` of the weights. With the weights in the page
cache, and (`cold`) with them dropped from it; the packages' own files stay in it. For the demo model, and
for one of SDXL's full size (`benchmarks.full_size` makes its folder) where --model names one. Writes medians
of wall and processor seconds, and peak memory, to `benchmarks/results/start.json` and docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from benchmarks.clones import ROOT, commit
from benchmarks.report import fill_in, write_result
from pipelines.weights import DEMO_MODEL, networks, weight_files

HEALTH = json.dumps({"input": {"action": "health"}})

PLAIN = """
import sys, torch
from diffusers import StableDiffusionXLPipeline
StableDiffusionXLPipeline.from_pretrained(sys.argv[1], torch_dtype=getattr(torch, sys.argv[2]))
"""


class Run(NamedTuple):
    """What one process took: seconds by the clock and of the processor, and its peak memory in MB."""

    wall: float
    processor: float
    peak_mb: float


class Model(NamedTuple):
    """A model whose start is measured."""

    folder: Path
    dtype: str

    @property
    def files(self) -> list[Path]:
        """Its weights."""
        return [file for network in networks(self.folder) for file in weight_files(network)]


def run(command: Sequence[str], folder: Path, environ: Mapping[str, str]) -> Run:
    """Runs a command to its end. Raises: RuntimeError if it fails."""
    begun = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **environ},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[:3]} failed with {process.returncode}")
    wall = time.perf_counter() - begun
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3)


def dropped(files: Sequence[Path]) -> None:
    """Takes the files out of the page cache."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def programs(model: Model, before: Path | None) -> dict[str, tuple[list[str], Path]]:
    """What is measured: name -> command and folder."""
    start = [sys.executable, "handler.py", "--test_input", HEALTH]
    found = {
        "import torch": ([sys.executable, "-c", "import torch"], ROOT),
        "import handler": ([sys.executable, "-c", "import handler"], ROOT),
        "worker": (start, ROOT),
        "diffusers": ([sys.executable, "-c", PLAIN, str(model.folder), model.dtype], ROOT),
        "cat": (["cat", *map(str, model.files)], ROOT),
    }
    if before:
        found["worker before"] = (start, before)
    return found


def measured(model: Model, before: Path | None, rounds: int, *, cold: bool) -> dict[str, Run]:
    """The median of each program's runs."""
    runs: dict[str, list[Run]] = {}
    with TemporaryDirectory() as cache:
        environ = {
            "WORKER_MODEL": str(model.folder),
            "WORKER_DTYPE": model.dtype,
            "WORKER_DEVICE": "cpu",
            "LORA_CACHE_DIR": cache,
        }
        for _ in range(rounds):
            for name, (command, folder) in programs(model, before).items():
                if cold:
                    dropped(model.files)
                runs.setdefault(name, []).append(run(command, folder, environ))
    return {
        name: Run(*(round(statistics.median(values), 2) for values in zip(*found, strict=True)))
        for name, found in runs.items()
    }


def table(results: Mapping[str, Mapping[str, Run]]) -> str:
    """The results for docs/benchmarks.md."""
    names = list(next(iter(results.values())))
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for case, runs in results.items():
        cells = [f"{one.wall:.1f} ({one.processor:.1f})" for one in runs.values()]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Does what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", nargs="?", help="a commit to compare with")
    parser.add_argument("--model", type=Path, help="a folder with a model of full size")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    models = {"demo": Model(DEMO_MODEL, "float32")}
    if options.model:
        models["full size"] = Model(options.model.resolve(), "bfloat16")
    results: dict[str, dict[str, Run]] = {}
    with commit(options.before) if options.before else nullcontext() as before:
        for name, model in models.items():
            for cold in (False, True):
                case = f"{name}, {'cold' if cold else 'in the page cache'}"
                results[case] = measured(model, before, options.rounds, cold=cold)
                print(case, results[case], flush=True)
    sizes = {name: sum(file.stat().st_size for file in one.files) for name, one in models.items()}
    figures = {
        case: {name: one._asdict() for name, one in runs.items()} for case, runs in results.items()
    }
    write_result("start", {"rounds": options.rounds, "weights_bytes": sizes, "runs": figures})
    fill_in("benchmarks.md", "start", table(results))


if __name__ == "__main__":
    main()
