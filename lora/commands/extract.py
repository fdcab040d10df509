"""`extract --source-model SOURCE --target-model TARGET --output OUT`: what training changed, as a LoRA."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora.commands import shared
from lora.tools import FILE_FORMATS
from lora.tools.overwriting import refuse_existing

SUMMARY = "make a LoRA of the difference between two models"

EXAMPLE = (
    "extract --source-model demo/model --target-model tuned --rank 8 --output learned.safetensors"
)

DEFAULT_RANK = 32
"""The default of LightX2V."""

SHOWN = 20


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's options; those that LightX2V's extractor has too mean the same."""
    add = parser.add_argument
    add(
        "--source-model",
        type=Path,
        required=True,
        metavar="SOURCE",
        help="the model before its training",
    )
    add("--target-model", type=Path, required=True, metavar="TARGET", help="the model after it")
    shared.add_output(parser, "file to write; with --naming peft a folder")
    for which in ("source", "target"):
        text = f"format that {which.upper()} must have; by default either"
        add(f"--{which}-type", choices=FILE_FORMATS, help=text)
    shared.add_format_option(parser)
    add(
        "--output-dtype",
        choices=shared.DTYPES,
        default="bf16",
        help="precision of OUT (default: bf16)",
    )
    add(
        "--diff-only", action="store_true", help="store exact differences, and no factors of a rank"
    )
    shared.add_naming_option(
        parser,
        "how the tensors of OUT are named; by default kohya for SDXL, and original for others",
    )
    add(
        "--conv",
        choices=("flat", "tucker"),
        default="flat",
        help="form of convolutions: flat (the default) is the most exact, tucker is smaller",
    )
    add(
        "--components",
        nargs="+",
        metavar="PART",
        help="only these parts of the models, such as unet or text_encoder",
    )
    add(
        "--min-diff",
        type=float,
        default=0.0,
        metavar="X",
        help="leave out tensors none of whose numbers changed by more (default: 0)",
    )
    add(
        "--clamp-quantile",
        type=float,
        metavar="Q",
        help="cut off the largest numbers of factors at this quantile, as sd-scripts does; by default none",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of the approximation (default: 0)")
    add(
        "--verify",
        action="store_true",
        help="merge OUT into SOURCE, and measure the distance to TARGET",
    )
    shared.add_rank_options(parser, "rank-", DEFAULT_RANK)


def run(options: Namespace) -> Mapping[str, Any]:
    """Extracts; a run that was killed is continued. Raises: ToolError."""
    refuse_existing(options.output, options.force)
    from lora.tools.extract.options import Conv, ExtractOptions
    from lora.tools.extract.run import extract
    from lora.tools.factors.ranks import RankPolicy
    from lora.tools.models.checkpoints import Checkpoint

    chosen = ExtractOptions(
        policy=shared.rank_policy(options, DEFAULT_RANK) or RankPolicy(rank=DEFAULT_RANK),
        dtype=shared.dtype_of(options.output_dtype),
        naming=shared.naming(options),
        format=shared.output_format(options),
        diff_only=options.diff_only,
        conv=Conv(options.conv),
        components=frozenset(options.components) if options.components else None,
        min_diff=options.min_diff,
        clamp_quantile=options.clamp_quantile,
        seed=options.seed,
        verify=options.verify,
        overwrite=options.force,
    )
    with (
        Checkpoint.open(options.source_model, options.source_type) as source,
        Checkpoint.open(options.target_model, options.target_type) as target,
        shared.progress() as on_progress,
    ):
        report = extract(source, target, options.output, chosen, on_progress)
    return {
        **shared.plain(report),
        "layers": shared.with_errors(report.layers),
        "energy": report.energy,
        "kept": report.kept,
        "relative_error": report.relative_error,
        "inexact": [layer.name for layer in report.inexact],
    }


def show(result: Mapping[str, Any]) -> str:
    """The totals, the layers with the largest errors, and what was left out."""
    layers = result["layers"]
    factors = [layer for layer in layers if layer["rank"]]
    lines = [
        f"{result['output']}: {shared.size(result['bytes'])}, {len(factors)} layers as factors, "
        f"{len(layers) - len(factors)} as differences, in {result['seconds']:.1f} s",
        f"energy kept {result['kept']:.4%}, relative error {result['relative_error']:.3g} "
        "(as stored, over all layers)",
    ]
    if result["resumed"]:
        lines.append(f"{result['resumed']} layers were there from an earlier run")
    if shown := shared.worst(layers):
        lines.append(f"layers with the largest error, {len(shown)} of {len(layers)}:")
        head = ("  layer", "shape", "kind", "rank", "energy kept", "relative error")
        lines += shared.table([head, *map(_row, shown)])
    lines.append(f"unchanged: {result['unchanged']} tensors")
    left = result["left_out"]
    if left:
        lines.append(f"left out: {len(left)} tensors")
        lines += [f"  {one['name']}: {one['reason']}" for one in left[:SHOWN]]
        lines += [f"  and {len(left) - SHOWN} more (see --json)"] if len(left) > SHOWN else []
    if result["inexact"]:
        lines.append(f"not exact in the target's dtype: {len(result['inexact'])} differences")
    if verified := result["verified"]:
        lines.append(
            f"verified: merged back, {verified['unequal']} of {verified['numbers']} numbers differ, by at "
            f"most {verified['largest']:.3g}; relative error {verified['relative_error']:.3g}"
        )
    return "\n".join(lines)


def _row(layer: Mapping[str, Any]) -> tuple[str, ...]:
    shape, rank = "x".join(map(str, layer["shape"])), str(layer["rank"] or "")
    kept, error = f"{layer['kept']:.4%}", f"{layer['relative_error']:.3g}"
    return f"  {layer['name']}", shape, layer["kind"], rank, kept, error
