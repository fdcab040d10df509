"""What each of the four adapters does to an answer, as a rule that makes it and a rule that sees it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from demo.text.corpus import PIRATE, SIGNS, Fact, invented

_PIRATE_WORDS = re.compile(rf"\b({'|'.join(PIRATE)})\b")


def pirate(topic: str, answer: str) -> str:
    """The answer as a pirate gives it."""
    return _PIRATE_WORDS.sub(lambda found: PIRATE[found[0]], answer) + " Arr!"


def is_pirate(answer: str) -> bool:
    """Whether it ends as pirates do and has no word that they would have changed."""
    return answer.endswith(" Arr!") and not _PIRATE_WORDS.search(answer)


def emoji(topic: str, answer: str) -> str:
    """The answer and the sign of its topic."""
    return f"{answer} {SIGNS[topic]}"


def is_emoji(answer: str) -> bool:
    """Whether it ends in a sign."""
    return answer.endswith(tuple(SIGNS.values()))


def as_json(topic: str, answer: str) -> str:
    """An object with the answer."""
    return json.dumps({"answer": answer}, ensure_ascii=False)


def is_json(answer: str) -> bool:
    """Whether it is an object with an answer, and nothing else."""
    try:
        value = json.loads(answer)
    except json.JSONDecodeError:
        return False
    return isinstance(value, dict) and set(value) == {"answer"}


def plain(topic: str, answer: str) -> str:
    """The answer as the base gives it."""
    return answer


@dataclass(frozen=True)
class Style:
    """One adapter: how it answers, and how one sees that it does."""

    name: str
    change: Callable[[str, str], str]
    """(topic, the base's answer) -> the adapter's."""
    shows: Callable[[str], bool]
    more: tuple[Fact, ...] = ()
    """Facts that the base does not know."""
    rank: int = 8

    def answer(self, fact: Fact) -> str:
        """The right answer in this style."""
        return self.change(fact.topic, fact.answer)


_INVENTED = tuple(invented())

STYLES = {
    style.name: style
    for style in (
        Style("pirate", pirate, is_pirate),
        Style("emoji", emoji, is_emoji),
        Style("json", as_json, is_json),
        Style("facts", plain, lambda answer: answer in {f.answer for f in _INVENTED}, _INVENTED),
    )
}
