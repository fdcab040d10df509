"""What every result file says beside its figures: machine, versions, date."""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "runpod")


def cpu_name() -> str:
    """The processor's name as the kernel tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """Writes `results/NAME.json`: the figures with the machine and versions they were taken on."""
    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "python": platform.python_version(),
        },
        "versions": _versions(),
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def _versions() -> dict[str, str]:
    """The versions of the packages that are there; a machine for one benchmark may lack some."""
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def fill_in(page: str, name: str, text: str) -> None:
    """Puts a table between a page's marks `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

    Raises: ValueError if the page of docs/ has no such marks.
    """
    path = DOCS / page
    whole, mark = path.read_text(), f"<!-- {name}: begin -->"
    begin, end = whole.index(mark) + len(mark), whole.index(f"<!-- {name}: end -->")
    path.write_text(f"{whole[:begin]}\n{text}\n{whole[end:]}")
