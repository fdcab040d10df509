"""`combine L1:0.8 L2:0.5 --output F`: several LoRAs as one."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora.commands.rewriting import add_write_options, as_result, show, write_options
from lora.commands.shared import add_rank_options, key_map_of, progress, rank_policy, with_scale
from lora.tools.overwriting import refuse_existing

__all__ = ["SUMMARY", "add_arguments", "run", "show"]

SUMMARY = "make one LoRA of several: exactly, at a rank, or by TIES or DARE"


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's options."""
    add = parser.add_argument
    add("loras", nargs="+", metavar="L[:SCALE]", help="files or PEFT folders, and how strongly (1)")
    add(
        "--method",
        choices=("concat", "ties", "dare"),
        default="concat",
        help="concat adds them up, and is exact unless a rank is chosen (concat)",
    )
    add("--density", type=float, default=0.5, metavar="X", help="what TIES and DARE keep (0.5)")
    add("--seed", type=int, default=0, help="of DARE and of randomised SVDs (0)")
    add("--model", metavar="A", help="the model that they are for, or `sdxl`, if names differ")
    add_rank_options(parser)
    add_write_options(parser, "(fp32, so that nothing is rounded)")


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
