"""`inspect LORA...`: describes adapter files, and how much they change."""

from __future__ import annotations

import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora.commands.charts import Bar, drawn_chart, text_bars
from lora.commands.shared import add_force, key_lines, key_map_of, plain, progress, size, write_file
from lora.errors import LoraError, ToolError
from lora.tools.overwriting import refuse_other_kind, refuse_overwriting

SUMMARY = "tell what LoRA files are: algorithm, base model, ranks, training, hashes, norms"

EXAMPLE = "inspect demo/loras/demo-stripes.safetensors --against demo/model"

SHOWN_WORDS = 15


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's options."""
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="LORA", help="a file, or a folder that PEFT saved")
    add(
        "--against",
        metavar="MODEL",
        help="also tell whether they fit a model: a checkpoint, a folder of diffusers, or `sdxl`",
    )
    add(
        "--plot",
        type=Path,
        metavar="OUT",
        help="draw the norms per block into a file that ends in .png or .svg",
    )
    add_force(parser, "OUT")


def run(options: Namespace) -> Mapping[str, Any]:
    """Describes every file; an error in one is reported, and the others are described."""
    if options.plot:
        refuse_overwriting(options.plot, options.force)
        refuse_other_kind(options.plot, is_folder=False)
    from lora.tools.describe import describe

    if options.plot and len(options.files) > 1:
        raise ToolError("--plot draws one file, and several are given", "Inspect it alone.")
    against = key_map_of(options.against)
    files, errors = [], []
    with progress() as on_progress:
        for index, path in enumerate(options.files):
            on_progress(index, len(options.files), path.name)
            try:
                described = describe(path, against)
            except LoraError as error:
                errors.append(str(error))
            except OSError as error:
                errors.append(str(ToolError(f"{path}: {error.strerror or error}")))
            else:
                files.append({"path": str(path), **plain(described)})
    if options.plot and files:
        _plot(files[0], options.plot)
    return {"files": files, "errors": errors}


def _plot(described: Mapping[str, Any], path: Path) -> None:
    title = f"{described['file']}: norm of the change per block, at scale 1"
    write_file(path, drawn_chart(title, _bars(described), path))


def _bars(described: Mapping[str, Any]) -> list[Bar]:
    return [
        Bar(
            row["component"] if row["block"] == "all" else f"{row['component']} {row['block']}",
            row["norm"],
            f"{row['layers']} layer{'s' * (row['layers'] != 1)}",
        )
        for row in described["norms"]
    ]


def show(result: Mapping[str, Any]) -> str:
    """A paragraph and a chart for each file."""
    return "\n\n".join("\n".join(_lines(file)) for file in result["files"])


def _lines(file: Mapping[str, Any]) -> Iterator[str]:
    yield f"{file['file']}  {size(file['bytes'])}, {file['tensors']} tensors, {file['form']}"
    yield from _fact_lines(file)
    yield from _component_lines(file["components"])
    if file["training"]:
        yield "  training"
        yield from (f"    {name}: {text}" for name, text in file["training"].items())
    yield "  hashes"
    yield from _hash_lines(file)
    yield from _norm_lines(file)
    yield from _unused_lines("unused by any model", len(file["unused"]), file["unused"])
    if fit := file["fit"]:
        yield from _fit_lines(fit)
    yield from (f"  note: {warning}" for warning in file["warnings"])


def _fact_lines(file: Mapping[str, Any]) -> Iterator[str]:
    bases = "; ".join(f"{name}: {text}" for name, text in file["base_told_by"].items())
    words = list(file["words"].items())
    shown = [f"{word} ({count})" if count else word for word, count in words[:SHOWN_WORDS]]
    more = [f"and {len(words) - SHOWN_WORDS} more"] if len(words) > SHOWN_WORDS else []
    facts = {
        "algorithm": ", ".join(f"{name} ({n} modules)" for name, n in file["algorithms"].items()),
        "layout": ", ".join(f"{name} ({n} tensors)" for name, n in file["layouts"].items()),
        "base model": f"{file['base'] or 'unknown'}{f' ({bases})' if bases else ''}",
        "dtype": ", ".join(f"{name} ({n} tensors)" for name, n in file["dtypes"].items()),
        "trigger words": ", ".join(shown + more),
        "embeddings": ", ".join(word or "named after the file" for word in file["embeddings"]),
    }
    yield from (f"  {name}: {text}" for name, text in facts.items() if text)


def _component_lines(components: Mapping[str, Any]) -> Iterator[str]:
    for name, component in components.items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in component["kinds"].items())
        yield f"  {name}: {component['modules']} modules ({kinds})"
        spreads = ((number, component[number]) for number in ("rank", "alpha", "scaling"))
        ranges = [f"{number} {_range(spread)}" for number, spread in spreads if spread]
        if ranges:
            yield f"    {', '.join(ranges)}"


def _range(spread: Mapping[str, float]) -> str:
    if spread["least"] == spread["most"]:
        return f"{spread['least']:g}"
    return f"{spread['least']:g} to {spread['most']:g} (mostly {spread['usual']:g})"


HASHES = {
    "sha256": "sha256",
    "autov1": "AutoV1 (Civitai)",
    "autov2": "AutoV2 (Civitai)",
    "autov3": "AutoV3 (Civitai, web UIs)",
    "crc32": "CRC32 (Civitai)",
    "model_hash": "sshs_model_hash (kohya)",
    "legacy_hash": "sshs_legacy_hash (kohya)",
}


def _hash_lines(file: Mapping[str, Any]) -> Iterator[str]:
    for name, label in HASHES.items():
        if value := file["hashes"][name]:
            yield f"    {label}: {value}"
    yield from (f"    in the file, {name}: {text}" for name, text in file["hashes_told"].items())


def _norm_lines(file: Mapping[str, Any]) -> Iterator[str]:
    bars = _bars(file)
    if bars:
        yield "  norm of the change per block, at scale 1"
        width = shutil.get_terminal_size().columns - 4
        lines = text_bars(bars, width, unicode=_has_blocks())
        yield from (f"    {line}" for line in lines)
    if file["without_norm"]:
        yield f"    not counted: {file['without_norm']} layers whose change depends on the model's weights"


def _has_blocks() -> bool:
    try:
        "█▏".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _fit_lines(fit: Mapping[str, Any]) -> Iterator[str]:
    if fit["trouble"]:
        yield f"  does not fit the model: {fit['trouble']}"
        return
    yield f"  fits the model: {fit['matched']} tensors matched, on {fit['modules']} modules"
    yield from _unused_lines("unmatched", fit["unmatched"], fit["keys"])


def _unused_lines(what: str, count: int, keys: list[Mapping[str, str]]) -> Iterator[str]:
    if count:
        yield f"  {what}: {count} tensors"
        yield from key_lines(keys, count)
