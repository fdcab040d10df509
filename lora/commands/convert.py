"""`convert F --output G [--naming N] [--algorithm lora --rank N]`: to another naming or algorithm."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lora.commands.rewriting import add_write_options, as_result, show, write_options
from lora.commands.shared import add_rank_options, progress, rank_policy
from lora.errors import ToolError

__all__ = ["SUMMARY", "add_arguments", "run", "show"]

SUMMARY = "rename a LoRA's tensors for another tool, or make a LoRA of another algorithm"


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's options."""
    add = parser.add_argument
    add("file", type=Path, metavar="F", help="a file, or a folder that PEFT saved")
    add(
        "--algorithm",
        choices=("lora",),
        help="make LoRAs of layers of other algorithms; by default none",
    )
    add(
        "--model",
        type=Path,
        metavar="A",
        help="the model that it is for: DoRA, OFT, GLoRA and IA3 need it to become a LoRA, and "
        "models other than SDXL to be renamed",
    )
    add("--seed", type=int, default=0, help="of the randomised SVD (0)")
    add_rank_options(parser)
    add_write_options(parser)


def run(options: Namespace) -> Mapping[str, Any]:
    """Converts. Raises: ToolError, LoraError."""
    from lora.tools.convert import ConvertOptions, Goal, convert
    from lora.tools.models.checkpoints import Checkpoint

    policy = rank_policy(options)
    if policy is not None and options.algorithm is None:
        hint = "Add --algorithm lora; `lora resize` shrinks a LoRA."
        raise ToolError("a rank is chosen, and nothing is to be cut to it", hint)
    chosen = ConvertOptions(
        write=write_options(options),
        algorithm=Goal(options.algorithm) if options.algorithm else None,
        policy=policy,
        seed=options.seed,
        allow_unused=options.allow_unused,
    )
    opening = Checkpoint.open(options.model) if options.model else nullcontext()
    with opening as model, progress() as on_progress:
        report = convert(options.file, options.output, chosen, model, on_progress)
    return as_result(report, options.output)
