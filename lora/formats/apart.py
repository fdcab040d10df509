"""Converts a stranger's pickle in a process of its own, which is ended if it takes too much.

A pickle is a program for a machine that builds lists and numbers: its size says nothing of the memory and the
time that it takes. The process has none of this one's secrets in its environment.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from lora import errors
from lora.errors import LoraError, LoraTooLarge

CPU_SECONDS, SECONDS = 120, 600
"""The computing that a conversion may take, and all its time: a volume may be slow."""

COPIES, ROOM = 2.2, 128 << 20
"""The memory that it may take besides that of torch: so many times the limit of a file, which is twice what a
file of that size takes, and bytes for all else."""

COMMAND = "from lora.formats.apart import main; main()"

TOO_MUCH = "the pickle takes more memory or time than a LoRA of the largest size may"


def convert_apart(source: Path, target: Path, limit: int) -> None:
    """As `lora.formats.pickles.convert`. Raises: LoraError, as it does; LoraTooLarge if it took too much."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    root = Path(__file__).parent.parent.parent
    try:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, str(source), str(target), str(limit)],
            env={**kept, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LoraTooLarge(TOO_MUCH) from error
    if done.returncode == 0:
        return
    try:
        told = json.loads(done.stdout)
        kind = told["error"]
    except (ValueError, LookupError, TypeError):
        raise LoraTooLarge(TOO_MUCH) from None
    if kind == OSError.__name__:
        raise OSError(told["number"], told["sentence"])
    raise getattr(errors, kind)(told["sentence"], told["hint"])


def main() -> None:
    """The process: its arguments are those of `convert`, and it tells what it raises."""
    source, target, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    import torch  # before the limits: how much of memory it takes depends on how it was built

    from lora.formats.pickles import convert

    torch.set_num_threads(1)
    gc.disable()  # it would walk millions of empty lists again and again; the process ends soon
    pages = int(Path("/proc/self/statm").read_text().split()[5])  # data and stack
    data = pages * resource.getpagesize() + int(limit * COPIES) + ROOM
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    told: dict[str, str | int | None]
    try:
        convert(source, target, limit)
    except LoraError as error:
        told = {"error": type(error).__name__, "sentence": error.sentence, "hint": error.hint}
    except OSError as error:
        told = {"error": OSError.__name__, "number": error.errno, "sentence": error.strerror}
    else:
        return
    sys.stdout.write(json.dumps(told))
    sys.exit(1)
