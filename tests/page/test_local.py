"""A worker in the page's process answers as an endpoint does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from handler import Worker
from page.local import Local
from tests.page.serving import Served, served
from tests.waiting import until

QUICK = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1, "scheduler": "K_EULER"}


@pytest.fixture
def page(demo_worker: Worker) -> Iterator[Served]:
    with served(lambda: Local(demo_worker)) as running:
        yield running


def end(page: Served, given: dict[str, Any]) -> dict[str, Any]:
    job = page.post("/api/run", {"input": given}).json()["id"]

    def look() -> dict[str, Any] | None:
        state: dict[str, Any] = page.get(f"/api/status/{job}").json()
        return None if state["status"].startswith("IN_") else state

    found = until(look)
    assert found
    return found


def test_a_picture_is_the_same_as_by_a_plain_call(page: Served, demo_worker: Worker) -> None:
    done = end(page, QUICK)
    assert done["status"] == "COMPLETED"
    assert done["output"]["images"] == demo_worker({"input": QUICK})["images"]


def test_progress_is_seen_and_a_job_can_be_cancelled(page: Served) -> None:
    given = {**QUICK, "num_inference_steps": 1000, "preview": True}
    job = page.post("/api/run", {"input": given}).json()["id"]

    def update() -> Any:
        return page.get(f"/api/status/{job}").json().get("output")

    assert until(update)["phase"] == "generating"
    assert page.get("/api/health").json()["workers"]["running"] == 1
    assert page.post(f"/api/cancel/{job}", {}).json()["status"] == "CANCELLED"
    assert end(page, QUICK)["status"] == "COMPLETED"
    assert page.get(f"/api/status/{job}").json()["status"] == "CANCELLED"


def test_an_error_is_told_and_the_next_job_runs(page: Served) -> None:
    failed = end(page, {"prompt": "x", "loras": ["no-such-lora"]})
    assert (failed["status"], failed["error"][:15]) == ("FAILED", "LORA_NOT_FOUND:")
    assert end(page, {"action": "health"})["output"]["model"] == "demo"
    assert page.get("/api/status/0123").status_code == 404
