"""The modes of applying a stack, and how `auto` chooses, by measurements (docs/benchmarks.md)."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # settings and requests name the modes, and import without it


class Mode(StrEnum):
    """How to apply a stack: see `lora.engine.engine`."""

    AUTO = "auto"
    DYNAMIC = "dynamic"
    MERGED = "merged"


MERGING_PAYS_AFTER = {"cpu": 3, "cuda": 4}
"""The number of denoising steps from which on merging is cheaper than the extra cost of dynamic steps.

CPU, rank 16, a latent of 48 x 48: merging for the first time and restoring took 7.8 s, a dynamic step 2.8 s
more than one without LoRA. CUDA is not measured yet.
"""

SPARE_BYTES = 2_000_000_000
"""Memory that must stay free for the drawing itself."""


def choose_mode(
    *, ranged: bool, steps: int | None, needed_bytes: int, device: torch.device
) -> Mode:
    """The mode for `auto`: merged where that pays, dynamic where merging is impossible or costs too much.

    `needed_bytes`: the size of the originals that are not kept yet.
    """
    if ranged or (steps is not None and steps < MERGING_PAYS_AFTER.get(device.type, 4)):
        return Mode.DYNAMIC
    free = free_bytes(device)
    if needed_bytes and free is not None and needed_bytes + SPARE_BYTES > free:
        return Mode.DYNAMIC
    return Mode.MERGED


def free_bytes(device: torch.device) -> int | None:
    """The bytes that are free on a device; None if the system does not show them.

    On CUDA, memory that torch has reserved and does not use counts as free. On a CPU it is what the kernel
    calls available, or what is left of the container's limit if that is less.
    """
    if device.type == "cuda":
        import torch

        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    counts = [count for count in (_available(), _left_of_limit()) if count is not None]
    return min(counts, default=None)


def _available(path: Path = Path("/proc/meminfo")) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:  # not Linux
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kilobytes[0]) * 1024 if kilobytes else None


def _left_of_limit(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no limits of this kind here
        return None
    return int(limit) - used if limit.isdigit() else None
