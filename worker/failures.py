"""Memory that ran out, what nobody foresaw, and the answers to jobs that failed."""

from __future__ import annotations

import logging
import traceback

from lora.errors import CodedError
from worker.parts import Answer
from worker.pictures.outputs import sendable

log = logging.getLogger("worker")


class OutOfMemory(CodedError):
    """The device's memory did not suffice for the job."""

    code = "OUT_OF_MEMORY"


OOM_HINT = "Ask for fewer or smaller pictures."


class Unexpected(CodedError):
    """An error that nobody foresaw: a fault of the worker."""

    code = "INTERNAL"


class ErrorText(str):
    """An answer's `error` as text, which knows the error that it tells of."""

    error: CodedError

    @classmethod
    def of(cls, error: CodedError) -> ErrorText:
        """`CODE: sentence. hint`, as it can be posted."""
        text = cls(sendable(str(error)))
        text.error = error
        return text


def unexpected(error: Exception) -> Unexpected:
    """Logs the traceback without the error's text, which may hold a URL or a token."""
    log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    words = f"the job failed unexpectedly ({type(error).__name__})"
    return Unexpected(words, "This is a fault of the worker; its log has the place.")


def failure(error: CodedError, *, refresh: bool = False) -> Answer:
    """Logs the error's code and returns the answer with it; `refresh` asks the platform for a new process.

    Its sentence may repeat what the request says, and is the client's alone.
    """
    log.info("job failed: %s", error.code)
    answer = {"error": ErrorText.of(error)}
    return {**answer, "refresh_worker": True} if refresh else answer
