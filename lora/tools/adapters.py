"""Adapter files for the tools: read from any naming, written in any naming."""

from __future__ import annotations

from lora.tools.parts import Adapter, Part, rank_metadata
from lora.tools.reading import header_of, read_adapter
from lora.tools.saving import Format, WriteOptions, write_adapter

__all__ = [
    "Adapter",
    "Format",
    "Part",
    "WriteOptions",
    "header_of",
    "rank_metadata",
    "read_adapter",
    "write_adapter",
]
