"""The tree of errors that are shown to users.

    CodedError
    ├── ToolError              TOOL_ERROR            a tool's input does not fit, or its output fails
    └── LoraError
        ├── SourceInvalid      LORA_SOURCE_INVALID   the reference cannot mean anything
        ├── LoraNotFound       LORA_NOT_FOUND        nothing is there
        ├── AccessDenied       LORA_ACCESS_DENIED    the source refuses us
        ├── DownloadFailed     LORA_DOWNLOAD_FAILED  the transfer broke, time and again
        ├── LoraTooLarge       LORA_TOO_LARGE        over the size that is allowed
        ├── LoraCorrupt        LORA_CORRUPT          the bytes are no adapter, or incomplete
        ├── LoraUnsupported    LORA_UNSUPPORTED      an adapter, in a form that we do not read
        ├── LoraIncompatible   LORA_INCOMPATIBLE     an adapter, for another model
        └── CacheFull          CACHE_FULL            no room on the volume

`schemas`, `pipelines` and `worker` hang their own leaves under `CodedError`. The answer of a failed job
is `str(error)`, so a message must hold no token, no signed URL and no path of this machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import ClassVar

MAX_SENTENCE = 4000
"""Characters; a sentence may repeat texts of a file or a request, and an answer must not grow too long."""


class CodedError(Exception):
    """A failure with a stable code, one sentence for a person, and a hint at what to do.

    `str()` gives `"CODE: sentence. hint"`, which is the answer's `error`.
    """

    code: ClassVar[str]

    def __init__(self, sentence: str, hint: str = "") -> None:
        self.sentence = sentence[:MAX_SENTENCE].rstrip(".")
        self.hint = hint
        super().__init__(f"{self.code}: {self.sentence}. {hint}".rstrip())


class ToolError(CodedError):
    """A tool's inputs do not fit together, or its output cannot be written."""

    code = "TOOL_ERROR"


class LoraError(CodedError):
    """Anything that keeps a LoRA from being found, fetched, read or applied."""


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Puts a name before the sentence of a LoraError that leaves the block, unless it is in it already."""
    try:
        yield
    except LoraError as error:
        if name in error.sentence:
            raise
        raise type(error)(f"{name}: {error.sentence}", error.hint) from error


class SourceInvalid(LoraError):
    """The reference cannot mean anything: a path out of the cache, an unknown scheme."""

    code = "LORA_SOURCE_INVALID"


class LoraNotFound(LoraError):
    """The reference is well formed, and nothing is there."""

    code = "LORA_NOT_FOUND"


class AccessDenied(LoraError):
    """The source wants a token, or another one than ours."""

    code = "LORA_ACCESS_DENIED"


class DownloadFailed(LoraError):
    """The transfer broke and did not recover."""

    code = "LORA_DOWNLOAD_FAILED"

    def __init__(self, sentence: str, hint: str = "", after: float | None = None) -> None:
        """`after`: the seconds that the source asks to wait, if it says so."""
        self.after = after
        super().__init__(sentence, hint)


class LoraTooLarge(LoraError):
    """The file is over the size that this worker takes."""

    code = "LORA_TOO_LARGE"


class LoraCorrupt(LoraError):
    """The bytes are not an adapter file, not all of it, or not the one that was asked for."""

    code = "LORA_CORRUPT"


class LoraUnsupported(LoraError):
    """An adapter file in a form that this version does not read."""

    code = "LORA_UNSUPPORTED"


class LoraIncompatible(LoraError):
    """An adapter file for another model than the one that is loaded."""

    code = "LORA_INCOMPATIBLE"


class CacheFull(LoraError):
    """There is no room for the file, and nothing that may be removed for it."""

    code = "CACHE_FULL"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint with the known names nearest to `name`; empty if none is near."""
    close = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}?" if close else ""
