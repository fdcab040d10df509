from __future__ import annotations

import pytest

from handler import Worker
from pipelines.prompts import encode


@pytest.fixture(scope="session", autouse=True)
def _hooks(demo_worker: Worker) -> None:
    """transformers puts its hooks on the text encoders at their first call."""
    encode(demo_worker.parts.pipeline.base, "a", None)
