"""`combine LORA:0.8 LORA:0.5 --output OUT`: several LoRAs as one."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora.commands.rewriting import add_write_options, as_result, show, write_options
from lora.commands.shared import add_rank_options, key_map_of, progress, rank_policy, with_scale
from lora.tools.overwriting import refuse_existing

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "run", "show"]

SUMMARY = "make one LoRA of several: exactly, at a rank, or by TIES or DARE"

EXAMPLE = (
    "combine demo/loras/demo-stripes.safetensors:0.8 demo/loras/demo-outline.safetensors:0.5 "
    "--output both.safetensors"
)


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's options."""
    add = parser.add_argument
    add(
        "loras",
        nargs="+",
        metavar="LORA[:SCALE]",
        help="files or folders that PEFT saved, and how strongly each counts (default: 1)",
    )
    add(
        "--method",
        choices=("concat", "ties", "dare"),
        default="concat",
        help="concat (the default) adds them, and is exact unless a rank is chosen; the others need one",
    )
    add(
        "--density",
        type=float,
        default=0.5,
        metavar="X",
        help="share of each change that ties and dare keep (default: 0.5)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of dare and of the approximation (default: 0)",
    )
    add(
        "--model",
        metavar="MODEL",
        help="the model (or `sdxl`) that they are for, if their names differ",
    )
    add_rank_options(parser)
    add_write_options(parser, "by default fp32, so that nothing is rounded")


def run(options: Namespace) -> Mapping[str, Any]:
    """Combines. Raises: ToolError, LoraError."""
    refuse_existing(options.output, options.force)
    from lora.engine.stack import LoraUse
    from lora.tools.combine import CombineOptions, Method, combine

    pairs = [with_scale(text) for text in options.loras]
    sources = [LoraUse(Path(path), 1.0 if scale is None else scale) for path, scale in pairs]
    chosen = CombineOptions(
        method=Method(options.method),
        policy=rank_policy(options),
        density=options.density,
        seed=options.seed,
        write=write_options(options),
        allow_unused=options.allow_unused,
    )
    with progress() as on_progress:
        report = combine(sources, options.output, chosen, key_map_of(options.model), on_progress)
    return as_result(report, options.output)
