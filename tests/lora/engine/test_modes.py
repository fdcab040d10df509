"""What `auto` chooses, and how it knows what memory is free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora.engine import modes
from lora.engine.modes import choose_mode
from lora.engine.stack import Mode

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({}, Mode.MERGED),
        ({"steps": 30}, Mode.MERGED),
        ({"steps": 1}, Mode.DYNAMIC),
        ({"steps": 30, "ranged": True}, Mode.DYNAMIC),
        ({"steps": 30, "needed_bytes": 10**15}, Mode.DYNAMIC),
        ({"steps": 30, "needed_bytes": 1}, Mode.MERGED),
        ({"steps": 30, "device": torch.device("xpu")}, Mode.MERGED),
    ],
)
def test_auto_merges_where_it_pays_and_fits(
    options: dict[str, Any], mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modes, "free_bytes", lambda _: modes.SPARE_BYTES + 100)
    given = {"ranged": False, "steps": None, "needed_bytes": 0, "device": CPU} | options
    assert choose_mode(**given) is mode


def test_free_memory_is_what_the_kernel_says() -> None:
    assert 10**6 < modes.free_bytes(CPU) < 10**14


def test_the_containers_limit_counts_where_it_is_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("1500\n")
    assert modes._left_of_limit(tmp_path) == 3500
    monkeypatch.setattr(modes, "_left_of_limit", lambda: 3500)
    assert modes.free_bytes(CPU) == 3500


def test_what_tells_nothing_is_unknown_and_hinders_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1500\n")
    assert modes._left_of_limit(tmp_path) is None
    assert modes._left_of_limit(tmp_path / "none") is None
    assert modes._available(tmp_path / "none") is None
    monkeypatch.setattr(modes, "free_bytes", lambda _: None)
    assert choose_mode(ranged=False, steps=30, needed_bytes=10**15, device=CPU) is Mode.MERGED
