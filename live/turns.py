"""A lock whose holder sees whether others wait, and that is handed on in the order of asking."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """One at a time, in the order in which they came: jobs that draw, and live sessions frame by frame."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._line: deque[threading.Event] = deque()
        """The first one's turn it is."""

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for the present turn's end."""
        return len(self._line) > 1

    def __enter__(self) -> Turns:
        mine = threading.Event()
        with self._guard:
            self._line.append(mine)
            self._line[0].set()
        try:
            mine.wait()
        except BaseException:
            self._leave(mine)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._leave(self._line[0])

    def _leave(self, mine: threading.Event) -> None:
        with self._guard:
            self._line.remove(mine)
            if self._line:
                self._line[0].set()
