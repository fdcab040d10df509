"""`merge --source-model MODEL --lora-model LORA[:SCALE] ... --output OUT`: LoRAs into a model's weights."""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora.commands import shared
from lora.errors import ToolError
from lora.formats.names.prefixes import COMPONENTS
from lora.tools import FILE_FORMATS
from lora.tools.overwriting import refuse_existing

SUMMARY = "write a model with LoRAs merged into its weights"

EXAMPLE = (
    "merge --source-model demo/model --lora-model demo/loras/demo-stripes.safetensors:0.8 "
    "--output tuned"
)


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's options; those that LightX2V's merger has too mean the same."""
    add = parser.add_argument
    add(
        "--source-model",
        type=Path,
        required=True,
        metavar="MODEL",
        help="the model that gets the LoRAs",
    )
    add(
        "--lora-model",
        nargs="+",
        action="extend",
        required=True,
        metavar="LORA[:SCALE]",
        help="files or folders that PEFT saved, and how strongly each counts; may be repeated",
    )
    shared.add_output(
        parser, "model to write: one file if it ends as weights do, else a folder like MODEL's"
    )
    add(
        "--alpha",
        type=float,
        default=1.0,
        metavar="SCALE",
        help="scale of each LORA that has none of its own (default: 1)",
    )
    add(
        "--source-type", choices=FILE_FORMATS, help="format that MODEL must have; by default either"
    )
    add("--lora-type", choices=FILE_FORMATS, help="has no effect: the files say what they are")
    shared.add_format_option(parser)
    add(
        "--output-dtype",
        choices=("same", *shared.DTYPES, "fp8"),
        default="same",
        help="precision of OUT; same (the default) keeps each tensor's own",
    )
    add(
        "--allow-unused",
        action="store_true",
        help="leave out tensors that have no place in MODEL, instead of refusing them",
    )
    add(
        "--components",
        nargs="+",
        type=component_factor,
        default=[],
        metavar="PART=X",
        help="a further scale for a part of MODEL, such as text_encoder=0",
    )
    add(
        "--blocks",
        type=block_factors,
        default={},
        metavar="X,X,…",
        help="further scales for the blocks of the UNet: 12 or 20 numbers, or a JSON object by names",
    )


def component_factor(text: str) -> tuple[str, float]:
    """`text_encoder=0` -> (component, factor). Raises: ArgumentTypeError."""
    name, _, factor = text.partition("=")
    if name not in COMPONENTS:
        raise ArgumentTypeError(f"{name!r} is none of {', '.join(COMPONENTS)}")
    try:
        return name, float(factor)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not written as {name}=0.5") from None


def block_factors(text: str) -> dict[str, float]:
    """The factors of `lora.formats.names.blocks`, from numbers or JSON. Raises: ArgumentTypeError."""
    from lora.formats.names.blocks import parse_blocks

    try:
        return parse_blocks(json.loads(text) if text.lstrip().startswith("{") else text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def run(options: Namespace) -> Mapping[str, Any]:
    """Merges. Raises: ToolError; LoraError for an adapter that cannot be read or fits nowhere."""
    refuse_existing(options.output, options.force)
    from lora.engine.stack import LoraUse
    from lora.tools.merge import MergeOptions, merge
    from lora.tools.models.checkpoints import Checkpoint

    loras = []
    for text in options.lora_model:
        source, scale = shared.with_scale(text)
        if not Path(source).exists():
            raise ToolError(f"there is no file {source}", "It is named by --lora-model.")
        factors = dict(options.components), options.blocks
        loras.append(LoraUse(Path(source), options.alpha if scale is None else scale, *factors))
    chosen = MergeOptions(
        options.output_dtype, options.output_format, options.allow_unused, options.force
    )
    with (
        Checkpoint.open(options.source_model, options.source_type) as model,
        shared.progress() as on_progress,
    ):
        report = merge(model, loras, options.output, chosen, on_progress)
    return {"output": str(options.output), **shared.plain(report)}


def show(result: Mapping[str, Any]) -> str:
    """What was written, and how many tensors of each LoRA were used."""
    count = len(result["files"])
    lines = [
        f"{result['output']}: {shared.size(result['bytes'])}{f' in {count} files' if count > 1 else ''}, "
        f"{result['parameters']} parameters changed, dtype {result['dtype']}, {result['seconds']:.1f} s"
    ]
    for lora in result["loras"]:
        unused = lora["unused"]
        lines.append(
            f"{lora['name']}: scale {lora['scale']:g}, {lora['used']} tensors used, {len(unused)} unused"
        )
        lines += shared.key_lines(unused)
    lines += [f"left out: {name}" for name in result["left_out"]]
    return "\n".join(lines)
