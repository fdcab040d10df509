"""How many scans a JPEG has: each goes over the whole picture, and a scan of eight bytes takes as long."""

from __future__ import annotations

import re

MAX_SCANS = 100
"""Encoders write one to twelve; the format's own scripts for progressive pictures have fewer than 64."""

MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)

START_OF_SCAN, END = 0xDA, 0xD9

ALONE = {0x01, *range(0xD0, 0xD9)}
"""Markers without a segment behind them."""


def has_too_many_scans(data: bytes) -> bool:
    """Whether a JPEG has over MAX_SCANS scans. What a decoder skips is skipped, and what comes after its end
    does not count.
    """
    scans, place = 0, 0
    while scans <= MAX_SCANS and (found := MARKER.search(data, place)):
        kind, place = found[1][0], found.end()
        if kind == END:
            break
        scans += kind == START_OF_SCAN
        if kind not in ALONE:
            place += int.from_bytes(data[place : place + 2], "big")
    return scans > MAX_SCANS
