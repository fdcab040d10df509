"""The tools for adapter files and checkpoints, as functions, and the names that all of them use. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from enum import StrEnum
from typing import TypeVar

OnProgress = Callable[[int, int, str], None]
"""Called with (done, total, what); the unit is the tool's."""


def ignore_progress(done: int, total: int, what: str) -> None:
    """For callers who do not watch."""


class Format(StrEnum):
    """The kinds of file that models and adapters are stored in."""

    SAFETENSORS = "safetensors"
    PYTORCH = "pytorch"


FILE_FORMATS = tuple(map(str, Format))

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Endings of files with weights that can be read, the preferred first; all but the first are pickles."""

_CLIP_TABLES = ("token_embedding", "position_embedding", "embed_tokens", "embed_positions")
TABLES = frozenset({*_CLIP_TABLES, "shared", "wte", "wpe"})
"""Modules whose weight is a table of rows and not a matrix of a product."""

HEADER_ALIGNMENT = 8
"""A .safetensors header is filled with spaces to a multiple of it, so that no number crosses a boundary."""


def dtype_name(dtype: object) -> str:
    """`float16` for `torch.float16`."""
    return str(dtype).removeprefix("torch.")


Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def read_ahead(
    items: Iterable[Item], read: Callable[[Item], Loaded]
) -> Iterator[tuple[Item, Loaded]]:
    """Each item with what `read` gives for it, read while the caller works on the item before."""
    with ThreadPoolExecutor(1) as pool:
        ready: tuple[Item, Future[Loaded]] | None = None
        for item in items:
            coming = item, pool.submit(read, item)
            if ready:
                yield ready[0], ready[1].result()
            ready = coming
        if ready:
            yield ready[0], ready[1].result()
