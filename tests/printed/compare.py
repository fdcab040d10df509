"""Compares what a page says with what comes out.

In the page, an ellipsis is any text, and alone on a line any lines. Seconds, times of day and ids may differ;
numbers with a fraction, or of six digits and more, may by 2%.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tests.printed.blocks import Wrong

NEAR = 0.02

# --- text -------------------------------------------------------------------------------------------

_VARYING = re.compile(
    r"""(?P<any>…)
    | (?P<when>\d{4}-\d\d-\d\d[ ]\d\d:\d\d(?::\d\d)?)
    | (?P<clock>\b\d\d:\d\d:\d\d\b)
    | (?P<id>\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b)
    | (?P<seconds>(?<![\w.])\d+(?:\.\d+)?(?=[ ](?:ms|s|seconds)\b))
    | (?P<near>(?<![\w.])(?:\d+\.\d+|\d{6,})(?![\w.]))
    | (?P<bar>[█▉▊▋▌▍▎▏]+)
    | (?P<space>[ ]+)""",
    re.VERBOSE,
)
_FOR = {
    "any": ".*",
    "when": r"\d{4}-\d\d-\d\d \d\d:\d\d(?::\d\d)?",
    "clock": r"\d\d:\d\d:\d\d",
    "id": r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "seconds": r"\d+(?:\.\d+)?",
    "near": r"(\d+(?:\.\d+)?)",
    "bar": "[█▉▊▋▌▍▎▏]+",
    "space": " +",
}


def compare_text(said: str, found: str) -> None:
    """Raises: Wrong if what comes out is something else than what the page says."""
    expected = [line.rstrip() for line in said.strip().splitlines()]
    lines = [line.rstrip() for line in found.strip().splitlines()]
    if not _lines_match(expected, lines):
        raise Wrong(f"the page says\n{said.strip()}\n\nand what comes out is\n{found.strip()}")


def _lines_match(said: list[str], found: list[str]) -> bool:
    if not said:
        return not found
    if said[0].strip() == "…":
        return any(_lines_match(said[1:], found[skip:]) for skip in range(len(found) + 1))
    return bool(found) and _line_matches(said[0], found[0]) and _lines_match(said[1:], found[1:])


def _line_matches(said: str, found: str) -> bool:
    pattern, numbers, end = "", [], 0
    for part in _VARYING.finditer(said):
        kind = str(part.lastgroup)
        pattern += re.escape(said[end : part.start()]) + _FOR[kind]
        numbers += [float(part[0])] if kind == "near" else []
        end = part.end()
    match = re.fullmatch(pattern + re.escape(said[end:]), found)
    return bool(match) and all(
        near(number, float(group)) for number, group in zip(numbers, match.groups(), strict=True)
    )


def near(said: float, found: float) -> bool:
    """Whether two figures are one: another machine may round another way."""
    return abs(said - found) <= NEAR * abs(said)


# --- JSON -------------------------------------------------------------------------------------------

MEASURED = {"timings", "delayTime", "executionTime", "memory"}
"""Fields whose numbers are another machine's."""
NAMED = {"id", "workerId"}
"""Fields whose text is another run's."""


def compare_json(said: Any, found: Any, *, shortened: bool = False, at: str = "the answer") -> None:
    """Raises: Wrong with the place. Fields must come in the same order; `shortened`: some may be left out."""
    if isinstance(said, dict) and isinstance(found, dict):
        names = [name for name in found if name in said or not shortened]
        if list(said) != names:
            raise Wrong(f"{at}: the page has the fields {list(said)}, what comes out {list(found)}")
        for name, value in said.items():
            if name in MEASURED:
                _compare_measured(value, found[name], f"{at}.{name}")
            elif name not in NAMED:
                compare_json(value, found[name], shortened=shortened, at=f"{at}.{name}")
    elif isinstance(said, list) and isinstance(found, list) and len(said) == len(found):
        for number, (one, other) in enumerate(zip(said, found, strict=True)):
            compare_json(one, other, shortened=shortened, at=f"{at}[{number}]")
    elif not _same_value(said, found):
        raise Wrong(f"{at}: the page says {said!r}, what comes out is {str(found)[:200]!r}")


def _compare_measured(said: Any, found: Any, at: str) -> None:
    alike = type(said) is type(found) or {type(said), type(found)} <= {int, float}
    if not alike or (isinstance(said, dict) and list(said) != list(found)):
        raise Wrong(f"{at}: the page has {said}, what comes out {found}")


def _same_value(said: Any, found: Any) -> bool:
    if isinstance(said, str) and isinstance(found, str):
        return (
            re.fullmatch(".*".join(map(re.escape, said.split("…"))), found, re.DOTALL) is not None
        )
    if isinstance(said, float) and isinstance(found, float) and not said.is_integer():
        return near(said, found)
    return type(said) is type(found) and bool(said == found)


def parsed(text: str) -> Any:
    """JSON from a page. Raises: Wrong."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise Wrong(f"this is no JSON: {error}") from None
