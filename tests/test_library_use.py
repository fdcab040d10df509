"""What docs/library-use.md shows runs as it stands, with a loopback server in place of the hub."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lora
from tests.adapters import as_bytes, kohya
from tests.conftest import ROOT
from tests.server import LoopbackServer

PAGE = ROOT / "docs" / "library-use.md"


def test_every_block_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: LoopbackServer
) -> None:
    server.serve_repo("user/style-lora", {"style.safetensors": as_bytes(kohya())})
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    pictures = [names[name].tobytes() for name in ("plain", "striped", "merged", "both", "dark")]
    assert len(set(pictures)) == len(pictures)
    assert names["style"].file.layers
    assert server.hits["/api/models/user/style-lora"] == 1


def test_importing_lora_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import lora; print(*(set(sys.modules) - before))"
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert {name.partition(".")[0] for name in printed.split()} <= {
        "lora",
        *sys.stdlib_module_names,
    }


@pytest.mark.parametrize("name", lora.__all__)
def test_every_name_of_the_door_is_there_and_documented(name: str) -> None:
    assert getattr(lora, name).__doc__
    assert name in dir(lora)


def test_a_name_that_is_not_there_is_told() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LoraMotor'"):
        lora.LoraMotor  # noqa: B018


def test_a_pipeline_without_a_part_that_adapters_know_is_refused() -> None:
    pipeline = SimpleNamespace(components={"vae": object(), "unet": None})
    with pytest.raises(ValueError, match="none of unet"):
        lora.engine_for(pipeline)
