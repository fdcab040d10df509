"""A worker imports what its kind uses and no more: each library takes seconds of a start that is paid."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.waiting import PATIENCE

NEVER = {"peft", "bitsandbytes", "boto3", "botocore", "fastapi", "starlette", "uvicorn", "pandas"}
"""What neither a start nor a job without a bucket or a server needs."""

NOT_AT_ONCE = {
    "accelerate",
    "aiohttp",
    "diffusers",
    "huggingface_hub",
    "runpod",
    "scipy",
    "torch._dynamo",
    "transformers",
}
"""What the models need, and the handler's own import does not."""

JOB = """
settings = handler.Settings(model="demo", device="cpu", lora_cache_dir=Path(sys.argv[1]))
worker = handler.Worker(settings).setup()
answer = worker({"id": "a", "input": {"prompt": "a", "num_inference_steps": 1, "loras": ["demo-stripes"]}})
assert answer["loras"][0]["status"] == "applied", answer
"""


def imported(code: str, folder: Path) -> tuple[set[str], str]:
    """The modules that a process of its own has after this code, and what it said on stderr."""
    begin = "import sys\nfrom pathlib import Path\nimport handler\n"
    show = "\nprint(*(name for name, module in sys.modules.items() if module), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", begin + code + show, str(folder)],
        cwd=ROOT,
        env={name: text for name, text in os.environ.items() if not name.startswith("PYTHON")},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    return set(done.stdout.split()), done.stderr


def test_the_handler_imports_torch_and_little_else(tmp_path: Path) -> None:
    names, said = imported("", tmp_path)
    assert names & (NEVER | NOT_AT_ONCE) == set()
    assert {"torch", "handler"} <= names
    assert said == ""


@pytest.mark.slow
def test_the_first_job_imports_what_it_uses(tmp_path: Path) -> None:
    names, said = imported(JOB, tmp_path)
    assert names & NEVER == set()
    assert {"diffusers", "transformers"} <= names
    assert said == ""


@pytest.mark.slow
def test_what_was_left_out_can_still_be_imported(tmp_path: Path) -> None:
    names, _ = imported(JOB + "import scipy.stats, boto3", tmp_path)
    assert {"scipy.stats", "boto3"} <= names


@pytest.mark.slow
def test_every_sampler_works_though_its_module_comes_late(tmp_path: Path) -> None:
    draw = """
for name in SCHEDULERS:
    answer = worker({"id": "a", "input": {"prompt": "a", "num_inference_steps": 4, "scheduler": name}})
    assert "error" not in answer, (name, answer)
"""
    imported("from schemas import SCHEDULERS\n" + JOB + draw, tmp_path)
