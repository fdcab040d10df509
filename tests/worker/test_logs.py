import json
import logging

import pytest

from worker.logs import JOB_ID, JsonLines, ShortLines


def record(text: str, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("worker", logging.INFO, "f.py", 1, text, None, None)
    made.__dict__.update(more)
    return made


@pytest.fixture
def in_a_job() -> object:
    token = JOB_ID.set("job-1")
    yield
    JOB_ID.reset(token)


@pytest.mark.usefixtures("in_a_job")
def test_a_line_names_its_job() -> None:
    line = json.loads(JsonLines().format(record("done", about={"event": "job", "seconds": 1.5})))
    assert line["job"] == "job-1"
    assert (line["level"], line["logger"], line["text"]) == ("INFO", "worker", "done")
    assert (line["event"], line["seconds"]) == ("job", 1.5)
    assert line["time"].endswith("Z")
    assert ShortLines().format(record("done")) == "INFO worker [job-1]: done"


def test_outside_of_a_job_there_is_no_id() -> None:
    assert "job" not in json.loads(JsonLines().format(record("two\nlines")))
    assert "\n" not in JsonLines().format(record("two\nlines"))
    assert ShortLines().format(record("up")) == "INFO worker: up"
