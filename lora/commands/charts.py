"""Bar charts: as text for a terminal, as SVG, or as PNG by Pillow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lora.errors import ToolError

EIGHTHS = "▏▎▍▌▋▊▉█"
"""Blocks that fill one to eight eighths of a character's width."""

MIN_BAR = 10


@dataclass(frozen=True)
class Bar:
    """One bar of a chart."""

    label: str
    value: float
    note: str = ""


def text_bars(bars: Sequence[Bar], width: int, *, unicode: bool) -> list[str]:
    """The chart in lines of at most `width` characters, or of what a bar of 10 needs."""
    if not bars:
        return []
    largest = max(bar.value for bar in bars) or 1.0
    label = max(len(bar.label) for bar in bars)
    value = max(len(_number(bar.value)) for bar in bars)
    note = max(len(bar.note) for bar in bars)
    room = max(MIN_BAR, width - label - value - note - 6)
    lines = []
    for bar in bars:
        drawn = _drawn(bar.value / largest * room, unicode=unicode).ljust(room)
        parts = (bar.label.ljust(label), drawn, _number(bar.value).rjust(value), bar.note)
        lines.append("  ".join(parts).rstrip())
    return lines


def _number(value: float) -> str:
    return f"{value:.3g}"


def _drawn(length: float, *, unicode: bool) -> str:
    if not unicode:
        return "#" * round(length)
    eighths = round(length * len(EIGHTHS))
    whole, rest = divmod(eighths, len(EIGHTHS))
    return EIGHTHS[-1] * whole + (EIGHTHS[rest - 1] if rest else "")


ROW, MARGIN, LABELS, BARS, VALUES = 20, 16, 190, 420, 150
LEFT = MARGIN + LABELS
"""Sizes in a drawn chart, in pixels."""

INK, COLOUR = "#1f2933", "#2f6fb0"


def drawn_chart(title: str, bars: Sequence[Bar], path: Path) -> bytes:
    """The chart as a file's bytes: PNG or SVG by the path's ending. Raises: ToolError for another ending."""
    if path.suffix.lower() == ".svg":
        return _svg(title, bars).encode()
    if path.suffix.lower() == ".png":
        return _png(title, bars)
    raise ToolError(f"{path} is neither .png nor .svg", "Give the plot one of these endings.")


def _layout(bars: Sequence[Bar]) -> tuple[int, int, list[tuple[int, float, str]]]:
    """Width and height of the picture; for each bar its top edge, its length and the text after it."""
    largest = max((bar.value for bar in bars), default=1.0) or 1.0
    rows = [
        (2 * MARGIN + ROW * n, bar.value / largest * BARS, f"{_number(bar.value)}  {bar.note}")
        for n, bar in enumerate(bars, 1)
    ]
    return LABELS + BARS + VALUES + 2 * MARGIN, ROW * (len(bars) + 1) + 3 * MARGIN, rows


def _svg(title: str, bars: Sequence[Bar]) -> str:
    width, height, rows = _layout(bars)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" fill="{INK}">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="{MARGIN + 12}" font-size="14">{escape(title)}</text>',
    ]
    for bar, (top, length, text) in zip(bars, rows, strict=True):
        lines += [
            f'<text x="{LEFT - 8}" y="{top + 13}" text-anchor="end">{escape(bar.label)}</text>',
            f'<rect x="{LEFT}" y="{top + 3}" width="{length:.1f}" height="{ROW - 6}" fill="{COLOUR}"/>',
            f'<text x="{LEFT + length + 6:.1f}" y="{top + 13}">{escape(text)}</text>',
        ]
    return "\n".join([*lines, "</svg>\n"])


def _png(title: str, bars: Sequence[Bar]) -> bytes:
    from PIL import Image, ImageDraw, ImageFont

    width, height, rows = _layout(bars)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    font, large = ImageFont.load_default(12), ImageFont.load_default(14)
    draw.text((MARGIN, MARGIN), title, INK, large)
    for bar, (top, length, text) in zip(bars, rows, strict=True):
        draw.text((LEFT - 8, top + 3), bar.label, INK, font, anchor="ra")
        draw.rectangle((LEFT, top + 3, LEFT + length, top + ROW - 4), COLOUR)
        draw.text((LEFT + length + 6, top + 3), text, INK, font)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
