"""Tokens -> text as it grows: what may still change is held back.

A character may be spread over several tokens, and a stop string over several pieces. So the pieces that
`push` and `finish` return, joined, are the whole text, and no piece is ever taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HALF = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are no whole character."""

LONGEST = 16
"""Tokens after which a character counts as whole, whatever it is: UTF-8 needs four bytes."""


class Detokeniser:
    """One row's text."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), *, special: bool = False) -> None:
        """`stops`: strings that end the text, and are no part of it. `special`: shows special tokens."""
        self._tokenizer, self._stops, self._special = tokenizer, tuple(filter(None, stops)), special
        self._tokens: list[int] = []
        self._begin = self._done = 0
        """The tokens from which on is decoded, so that words keep their blanks; and those that are told."""
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.stopped: str | None = None
        """The stop string that ended the text."""

    def push(self, token: int) -> str:
        """The text that this token makes certain; empty if there is none yet, or the text has ended."""
        self._tokens.append(token)
        return self._release(self._grown(to_the_end=False), to_the_end=False)

    def finish(self) -> str:
        """The rest: nothing comes any more."""
        return self._release(self._grown(to_the_end=True), to_the_end=True)

    def _grown(self, *, to_the_end: bool) -> str:
        before = self._decoded(self._tokens[self._begin : self._done])
        now = self._decoded(self._tokens[self._begin :])
        half = now.endswith(HALF) and len(self._tokens) - self._done < LONGEST
        if len(now) <= len(before) or (half and not to_the_end):
            return ""
        self._begin, self._done = self._done, len(self._tokens)
        return now[len(before) :]

    def _decoded(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(tokens), skip_special_tokens=not self._special, clean_up_tokenization_spaces=False
        )
        return text

    def _release(self, new: str, *, to_the_end: bool) -> str:
        if self.stopped is not None:
            return ""
        text = self._held + new
        ends = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            at, self.stopped = min(ends)
            self._held = ""
            return text[:at]
        keep = 0 if to_the_end else self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _undecided(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
