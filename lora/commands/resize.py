"""`resize LORA --output OUT --rank N | --energy X | ... | --max-bytes N`: a LoRA at a smaller rank."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora.commands.rewriting import add_write_options, as_result, show, write_options
from lora.commands.shared import add_rank_options, key_map_of, progress, rank_policy
from lora.errors import ToolError
from lora.tools.overwriting import refuse_existing

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "run", "show"]

SUMMARY = "shrink a LoRA to a smaller rank, and tell the error"

EXAMPLE = "resize demo/loras/demo-stripes.safetensors --rank 4 --output small.safetensors"


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "file", type=Path, metavar="LORA", help="a file, or a folder that PEFT saved"
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="the model that it is for, where --naming needs its names"
    )
    add_rank_options(parser)
    add_write_options(parser)


def run(options: Namespace) -> Mapping[str, Any]:
    """Resizes. Raises: ToolError, LoraError."""
    refuse_existing(options.output, options.force)
    from lora.tools.resize import ResizeOptions, resize

    policy = rank_policy(options)
    if policy is None:
        hint = "Give --rank, --energy, --threshold, --ratio or --max-bytes."
        raise ToolError("no rank is chosen", hint)
    chosen = ResizeOptions(policy, write_options(options), options.allow_unused)
    with progress() as on_progress:
        report = resize(
            options.file, options.output, chosen, on_progress, key_map_of(options.model)
        )
    return as_result(report, options.output)
