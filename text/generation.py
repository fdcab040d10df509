"""One text under way: what was asked for, what has come of it so far, and how it ended."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora.engine.stack import Stack
from text.detokenise import Detokeniser
from text.loading import TextModel
from text.sampling import Chooser, Chosen, Sampling
from text.structured import Grammar


@dataclass(frozen=True)
class Piece:
    """What came since the last piece."""

    text: str
    tokens: tuple[Chosen, ...] = ()


@dataclass
class Times:
    """When things happened, in seconds of the monotonic clock; 0 for not yet."""

    queued: float = 0.0
    begun: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    last: float = 0.0
    """When the newest token came."""
    longest_wait: float = 0.0
    """The longest time between two tokens."""


class Generation:
    """One text: the scheduler's thread writes it, and any thread reads it.

    `finish` is None until it ends: then `stop`, `length`, or `error` with `error` set.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        stack: Stack = (),
        *,
        check: Callable[[], None] = lambda: None,
        notify: Callable[[], None] = lambda: None,
        special: bool = False,
        grammar: Grammar | None = None,
    ) -> None:
        """`check` raises what ends the text early; `notify` is told, in the scheduler's thread, of news.

        `special`: the text shows special tokens. `grammar`: what the text must be, used by it alone.
        """
        self.prompt, self.sampling, self.stack = tuple(prompt), sampling, tuple(stack)
        self.check, self._notify, self._special = check, notify, special
        self._grammar = grammar
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.stopped_by: str | int | None = None
        """The stop string or token that ended it, other than the model's own end."""
        self.error: BaseException | None = None
        self.times = Times(queued=time.monotonic())
        self._pieces: deque[Piece] = deque()
        self._done = threading.Event()

    def begin(self, text: TextModel) -> None:
        """Its turn has come."""
        self.times.begun = time.monotonic()
        self.chooser = Chooser(self.sampling, self.prompt, text.ends, self._grammar)
        self._words = Detokeniser(text.tokenizer, self.sampling.stop, special=self._special)
        self._limit = min(self.sampling.max_tokens, text.context - len(self.prompt))

    def take(self, chosen: Chosen) -> None:
        """Adds a token, and ends the text if it is the last. Raises: SchemaUnsupported."""
        now = time.monotonic()
        times = self.times
        if times.first:
            times.longest_wait = max(times.longest_wait, now - times.last)
        times.first, times.last = times.first or now, now
        self.tokens.append(chosen.token)
        self.chooser.took(chosen.token)
        if chosen.token in self.chooser.ends:
            if chosen.token in self.sampling.stop_token_ids:
                self.stopped_by = chosen.token
            self._put(self._words.finish(), chosen)
            return self.end("stop")
        text = self._words.push(chosen.token)
        if self._words.stopped is not None:
            self.stopped_by = self._words.stopped
            self._put(text, chosen)
            return self.end("stop")
        whole = self.chooser.complete
        if whole or len(self.tokens) >= self._limit:
            self._put(text + self._words.finish(), chosen)
            self.stopped_by = self._words.stopped
            return self.end("stop" if whole or self._words.stopped is not None else "length")
        self._put(text, chosen)
        return None

    def _put(self, text: str, chosen: Chosen) -> None:
        self._pieces.append(Piece(text, (chosen,)))
        self._notify()

    def end(self, finish: str, error: BaseException | None = None) -> None:
        """Ends the text, once."""
        if self.finish is None:
            self.error, self.times.ended = error, time.monotonic()
            self.finish = finish
            self._done.set()
            self._notify()

    def pieces(self) -> list[Piece]:
        """What came since the last call."""
        taken = []
        while self._pieces:
            taken.append(self._pieces.popleft())
        return taken

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the text has ended; False if it has not by then."""
        return self._done.wait(timeout)

    def text(self) -> str:
        """Waits for the whole text. Raises: what ended it early."""
        self.wait()
        if self.error is not None:
            raise self.error
        return "".join(piece.text for piece in self.pieces())


def about(generation: Generation) -> dict[str, Any]:
    """Its times for an answer, in seconds."""
    t = generation.times
    first = t.first or t.ended
    return {
        "queue": round(max(0.0, (t.begun or t.ended) - t.queued), 4),
        "first_token": round(max(0.0, first - t.queued), 4),
        "decode": round(max(0.0, t.ended - first), 4),
    }
