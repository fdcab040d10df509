"""`convert LORA --output OUT [--naming N] [--algorithm lora --rank N]`: to another naming or algorithm."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lora.commands.rewriting import add_write_options, as_result, show, write_options
from lora.commands.shared import add_rank_options, progress, rank_policy
from lora.errors import ToolError
from lora.tools.overwriting import refuse_existing

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "run", "show"]

SUMMARY = "rename a LoRA's tensors for another program, or make it a LoRA of plain factors"

EXAMPLE = (
    "convert demo/loras/demo-stripes.safetensors --model demo/model --naming diffusers "
    "--output renamed.safetensors"
)


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's options."""
    add = parser.add_argument
    add("file", type=Path, metavar="LORA", help="a file, or a folder that PEFT saved")
    add(
        "--algorithm",
        choices=("lora",),
        help="the algorithm that every layer gets, such as those of a LoHa; by default each keeps its own",
    )
    add(
        "--model",
        type=Path,
        metavar="MODEL",
        help="the model that it is for: needed to make a LoRA of DoRA, OFT, GLoRA or IA3, and to rename the "
        "tensors of one that is not for SDXL",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of the approximation (default: 0)")
    add_rank_options(parser)
    add_write_options(parser)


def run(options: Namespace) -> Mapping[str, Any]:
    """Converts. Raises: ToolError, LoraError."""
    refuse_existing(options.output, options.force)
    from lora.tools.convert import ConvertOptions, Goal, convert
    from lora.tools.models.checkpoints import Checkpoint

    policy = rank_policy(options)
    if policy is not None and options.algorithm is None:
        hint = "Add --algorithm lora, or shrink a LoRA with `resize`."
        raise ToolError("a rank is chosen, and only another algorithm would need one", hint)
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
