"""The frames that wait for the drawing: the newest wins."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

UNSENT = 8
"""With so many answers on their way to a client that does not read them, no further frame is drawn."""


@dataclass
class Waiting:
    """A frame that has come in."""

    seq: int | None
    picture: bytes
    look: Any
    """A `live.looks.Look`: what it is drawn with."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What its answer says of what it asked for."""
    came: float = field(default_factory=time.perf_counter)


class Inbox:
    """Holds the newest frames. Any thread may call each method.

    A client that has no more than `room` frames on their way loses none; of more, the oldest that waits is
    driven out.
    """

    def __init__(self, room: int) -> None:
        """`room`: how many frames may wait and be drawn at once."""
        self._news = threading.Condition()
        self._room = room
        self._frames: deque[Waiting] = deque()
        self._drawing = 0
        self._unsent = 0
        self.closed = False

    def put(self, frame: Waiting) -> list[Waiting]:
        """Takes a frame. Returns those that it drives out."""
        with self._news:
            self._frames.append(frame)
            self._news.notify_all()
            most = max(1, self._room - self._drawing)
            return [self._frames.popleft() for _ in range(len(self._frames) - most)]

    def take(self, patience: float | None) -> Waiting | None:
        """The frame that has waited longest, as soon as there is one and its answer could be sent.

        None once the inbox is closed, or after so many seconds; with a patience of None, it waits for ever.
        """
        with self._news:
            self._news.wait_for(lambda: self.closed or self._is_ready(), patience)
            if self.closed or not self._is_ready():
                return None
            self._drawing += 1
            return self._frames.popleft()

    def _is_ready(self) -> bool:
        return bool(self._frames) and self._unsent < UNSENT

    def done(self) -> None:
        """Says that a frame that was taken has its answer."""
        with self._news:
            self._drawing -= 1

    def answering(self, more: int) -> None:
        """Counts answers that are on their way (1), or were sent (-1)."""
        with self._news:
            self._unsent += more
            self._news.notify_all()

    def close(self) -> None:
        """Wakes whoever waits; nothing is taken any more."""
        with self._news:
            self.closed = True
            self._news.notify_all()
