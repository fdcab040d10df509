"""What the signs in a prompt mean: weights and breaks, as in AUTOMATIC1111's web UI. Imports without torch.

    (word)  [word]  (word:1.3)   1.1 times, 1/1.1 times and 1.3 times as strong; they nest, and multiply
    BREAK                        what follows stands in a chunk of its own
    \\(  \\)  \\[  \\]  \\\\          the sign itself

The rules are those that its wiki describes under "Attention/emphasis": the number holds for the round bracket
that it stands in, a closing bracket without an opening one is text, and an opening one that is never closed
holds to the end. Written anew, in two passes, so that the time grows with the prompt's length alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

EMPHASIS = 1.1
"""The weight of a round bracket without a number; a square one has its reciprocal."""

MAX_WEIGHT = 100
"""The largest weight, all brackets multiplied: in half precision, twenty times as much has no number."""

FACTORS = {"(": EMPHASIS, "[": 1 / EMPHASIS}
PAIRS = {")": "(", "]": "["}

_SIGNS = (
    r"\\(?P<escaped>[\\()\[\]])"
    r"|(?P<opening>[(\[])"
    r"|:\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<closing>[)\]])"
    r"|(?P<pause>\s*\bBREAK\b\s*)"
)
_SCHEDULED = re.compile(r"\||:\s*[\d.]+\s*$")

UNCLOSED = (
    "a bracket in the prompt is never closed, and weighs all that follows; write \\( for the sign"
)
SCHEDULED = "[from:to:when] and [one|other] change nothing from step to step here: they are text in brackets"


@dataclass(frozen=True)
class Piece:
    """A run of text that has one weight."""

    text: str
    weight: float = 1.0


@dataclass
class Parsed:
    """A prompt without its signs."""

    sections: list[list[Piece]] = field(default_factory=lambda: [[]])
    """What stands between the BREAKs: at least one section, and no empty one beside others."""
    warnings: list[str] = field(default_factory=list)

    def add(self, text: str, weight: float) -> None:
        """Appends text; to the last piece, if that has the same weight."""
        section = self.sections[-1]
        if section and section[-1].weight == weight:
            text = section.pop().text + text
        section.append(Piece(text, weight))

    def pause(self) -> None:
        """Begins a section, unless the last one is empty still."""
        if self.sections[-1]:
            self.sections.append([])


def pattern_of(words: Iterable[str]) -> str:
    """A pattern for any of the words, the longest first, and none as a part of a longer word: `party` does
    not match `art`."""

    def bounded(word: str) -> str:
        before = r"(?<!\w)" if re.match(r"\w", word) else ""
        after = r"(?!\w)" if re.search(r"\w$", word) else ""
        return f"{before}{re.escape(word)}{after}"

    return "|".join(map(bounded, sorted(words, key=len, reverse=True)))


def split_at(text: str, words: Collection[str]) -> list[str]:
    """The text in pieces: each of the words that it has, and what stands between them."""
    return [one for one in re.split(f"({pattern_of(words)})", text) if one] if words else [text]


def parse(prompt: str, words: Iterable[str] = ()) -> Parsed:
    """The prompt's text with its weights. A word of `words` is text, whatever signs it is made of.

    Raises: ValueError if a weight is over 100.
    """
    own = pattern_of(words)
    signs = re.compile(f"(?P<word>{own})|{_SIGNS}" if own else _SIGNS)
    found = [match for match in signs.finditer(prompt) if match.lastgroup != "word"]
    factors, ends, warnings = _matched(prompt, found)
    parsed = Parsed(warnings=warnings)
    active: dict[int, float] = {}
    place, weight = 0, 1.0
    for index, match in enumerate(found):
        if text := prompt[place : match.start()]:
            parsed.add(text, weight)
        place = match.end()
        if index in factors:
            active[index] = factors[index]
        elif index in ends:
            del active[ends[index]]
        elif match["pause"] is not None:
            parsed.pause()
            continue
        else:  # a sign that is text: escaped, or closing nothing
            parsed.add(match["escaped"] or match[0], weight)
            continue
        weight = _allowed(math.prod(active.values()))
    if text := prompt[place:]:
        parsed.add(text, weight)
    if len(parsed.sections) > 1 and not parsed.sections[-1]:
        parsed.sections.pop()
    return parsed


def _allowed(weight: float) -> float:
    if abs(weight) > MAX_WEIGHT:
        raise ValueError(f"a weight is over {MAX_WEIGHT}, all brackets multiplied")
    return weight


def _matched(
    prompt: str, found: list[re.Match[str]]
) -> tuple[dict[int, float], dict[int, int], list[str]]:
    """Opening sign -> its factor; closing sign -> its opening one, by places in `found`; and warnings."""
    factors: dict[int, float] = {}
    ends: dict[int, int] = {}
    open_now: dict[str, list[int]] = {"(": [], "[": []}
    warnings: dict[str, None] = {}
    for index, match in enumerate(found):
        if kind := match["opening"]:
            open_now[kind].append(index)
            factors[index] = FACTORS[kind]
            continue
        kind = "(" if match["number"] else PAIRS.get(match["closing"] or "", "")
        if kind and open_now[kind]:
            ends[index] = begun = open_now[kind].pop()
            if match["number"]:
                factors[begun] = float(match["number"])
            innermost = prompt[found[begun].end() : match.start()] if index == begun + 1 else ""
            if kind == "[" and _SCHEDULED.search(innermost):
                warnings[SCHEDULED] = None
    if any(open_now.values()):
        warnings[UNCLOSED] = None
    return factors, ends, list(warnings)
