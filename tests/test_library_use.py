"""The library's door: what `import lora` gives, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

import lora
from tests.conftest import ROOT


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
