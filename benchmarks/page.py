"""docs/benchmarks.md and its plot, from a result file: `python -m benchmarks.page`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import DOCS, RESULTS, fill_in, write_result


@dataclass(frozen=True)
class Row:
    """A line of the table: a figure of the result, and by which factor ours was to be faster."""

    title: str
    figure: str
    targets: Mapping[int, float]
    """Rank -> factor."""


ROWS: Sequence[Row] = (
    Row(
        "loaded and applied, dynamic; file in the model's dtype",
        "{}, the model's dtype: loaded, dynamic",
        {16: 25, 64: 25},
    ),
    Row(
        "the same, the file's dtype is cast (fp16 to bf16)",
        "{}, cast: loaded, dynamic",
        {16: 12, 64: 6},
    ),
    Row("removed again", "{}, the model's dtype: removed", {16: 40, 64: 40}),
    Row(
        "back to a stack used before",
        "{}, the model's dtype: back to a stack used before",
        {16: 250, 64: 250},
    ),
    Row("another scale", "{}, the model's dtype: another scale", {}),
    Row(
        "loaded and merged (its originals kept from before), against load and fuse",
        "{}, the model's dtype: loaded, merged",
        {16: 3, 64: 3},
    ),
    Row("restored exactly, against unfuse", "{}, the model's dtype: restored", {16: 12, 64: 12}),
)

OURS_ALONE = (
    (
        "merged for the first time, the originals copied",
        "{}, the model's dtype: merged for the first time, its originals copied",
    ),
    (
        "merged, back to a stack used before",
        "{}, the model's dtype: merged, back to a stack used before",
    ),
    (
        "file read instead of mapped (a network volume)",
        "{}, the model's dtype: loaded, dynamic, read instead of mapped",
    ),
)

STEP_TARGETS = {1: 3.0, 4: 10.0}
"""LoRAs -> percent that a step may take longer, dynamic."""


def keep(name: str, figures: dict[str, Any], *, cuda: bool, tiny: bool) -> Path:
    """Writes a result, and brings the page up to date where it is one that the page shows."""
    path = write_result(f"{'gpu_' if cuda else ''}{name}{'_tiny' if tiny else ''}", figures)
    if not tiny and not cuda:
        write_page()
    return path


def write_page() -> None:
    """Puts the results' tables into docs/benchmarks.md, and draws docs/benchmarks.svg."""
    result = json.loads((RESULTS / "lora_engine.json").read_text())
    of_steps = RESULTS / "lora_steps.json"
    steps = json.loads(of_steps.read_text()) if of_steps.exists() else None
    fill_in("benchmarks.md", "lora_engine", table(result, steps))
    (DOCS / "benchmarks.svg").write_text(plot(result))


def table(result: Mapping[str, Any], steps: Mapping[str, Any] | None) -> str:
    """The result as Markdown, each figure with its target and whether it was reached."""
    figures, machine = result["figures"], result["machine"]
    seconds = figures["median_seconds"]
    ranks = [
        rank for rank in (16, 64, 128) if f"rank {rank}, the model's dtype: removed" in seconds
    ]
    lines = [
        f"{result['date']}, {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; "
        f"{', '.join(f'{k} {v}' for k, v in result['versions'].items())}; medians of "
        f"{figures['rounds']} rounds.",
        "",
        "| | rank | diffusers + peft | ours | times faster | at least | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in ROWS:
        for rank in ranks:
            one = seconds.get(row.figure.format(f"rank {rank}"))
            if one is None:
                continue
            target = row.targets.get(rank)
            lines.append(
                f"| {row.title} | {rank} | {_time(one['theirs'])} | {_time(one['ours'])} | "
                f"{one['ratio']:.1f} | {target or ''} | {_verdict(target, one['ratio'])} |"
            )
    for title, figure in OURS_ALONE:
        for rank in ranks:
            if one := seconds.get(figure.format(f"rank {rank}")):
                lines.append(f"| {title} | {rank} | | {_time(one['ours'])} | | | |")
    exact = figures["numbers_changed_after_merge_and_restore"]
    lines += [
        "",
        f"Of {exact['of']:,} adapted numbers, {exact['theirs']:,} differed after diffusers' fuse and unfuse, "
        f"and {exact['ours']:,} after our merge and restore.",
        *(["", *_steps(steps["figures"])] if steps else []),
    ]
    return "\n".join(lines)


def _steps(figures: Mapping[str, Any]) -> list[str]:
    """What LoRAs cost per step."""
    least, most = figures["seconds_without_spread"]
    lines = [
        f"A step in {figures['dtype']} (rank 16, latent {figures['latent_side']} squared), against one "
        f"without a LoRA just before, of {_time(figures['seconds_without'])} in the median ({_time(least)} "
        f"to {_time(most)}); medians of {figures['rounds']} rounds:",
        "",
        "| LoRAs | diffusers + peft | ours, dynamic | at most | | ours, merged |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for count, target in STEP_TARGETS.items():
        theirs, ours, merged = (
            100 * (figures["ratios"][f"{count} {way}"] - 1)
            for way in ("dynamic, theirs", "dynamic, ours", "merged, ours")
        )
        lines.append(
            f"| {count} | {theirs:+.1f}% | {ours:+.1f}% | +{target:.0f}% | "
            f"{'reached' if ours <= target else 'missed'} | {merged:+.1f}% |"
        )
    return lines


def _verdict(target: float | None, ratio: float) -> str:
    if target is None:
        return ""
    return "reached" if ratio >= target else "missed"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


WIDTH, BAR, LEFT = 860, 15, 330


def plot(result: Mapping[str, Any]) -> str:
    """Both engines' times at rank 16, as bars on a logarithmic scale: SVG."""
    seconds = result["figures"]["median_seconds"]
    rows = [(row.title, seconds[row.figure.format("rank 16")]) for row in ROWS]
    least, most = 1e-4, 10.0
    scale = (WIDTH - LEFT - 80) / math.log10(most / least)
    height = len(rows) * (2 * BAR + 16) + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        '<text x="10" y="20">Rank 16 over 722 layers of SDXL, seconds on a logarithmic scale: '
        '<tspan fill="#c0504d">diffusers + peft</tspan>, <tspan fill="#1f6fb4">ours</tspan></text>',
    ]
    for exponent in range(-4, 2):
        x = LEFT + (exponent + 4) * scale
        parts.append(
            f'<line x1="{x:.0f}" y1="34" x2="{x:.0f}" y2="{height - 24}" stroke="#ddd"/>'
            f'<text x="{x:.0f}" y="{height - 8}" text-anchor="middle">{10.0**exponent:g} s</text>'
        )
    for number, (title, one) in enumerate(rows):
        top = 40 + number * (2 * BAR + 16)
        parts.append(f'<text x="{LEFT - 8}" y="{top + BAR + 4}" text-anchor="end">{title}</text>')
        for offset, (who, colour) in enumerate((("theirs", "#c0504d"), ("ours", "#1f6fb4"))):
            width = max(1.0, math.log10(max(one[who], least) / least) * scale)
            y = top + offset * BAR
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{width:.0f}" height="{BAR - 2}" fill="{colour}"/>'
                f'<text x="{LEFT + width + 5:.0f}" y="{y + BAR - 4}">{_time(one[who])}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    write_page()
