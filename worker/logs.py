"""The worker's log: JSON lines for the platform, short lines for a person, each with its job's id."""

from __future__ import annotations

import json
import logging
import os
import time
from contextvars import ContextVar

JOB_ID: ContextVar[str] = ContextVar("job_id", default="")
"""The id of the job that the running code works for; empty outside of a job."""


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, logger, text, job, and the fields of `extra={"about": {…}}`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "text": record.getMessage(),
        }
        if job_id := JOB_ID.get():
            line["job"] = job_id
        return json.dumps({**line, **getattr(record, "about", {})}, default=str)


class ShortLines(logging.Formatter):
    """Level, logger, job and text."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line."""
        job_id = JOB_ID.get()
        job = f" [{job_id}]" if job_id else ""
        return f"{record.levelname} {record.name}{job}: {record.getMessage()}"


def set_up(*, json_lines: bool) -> None:
    """Logs to stderr from INFO on, the SDK too unless its operator wants more: its DEBUG logs every answer.

    To be called before runpod is imported.
    """
    os.environ.setdefault("RUNPOD_DEBUG_LEVEL", "INFO")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if json_lines else ShortLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
