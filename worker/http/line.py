"""Who is worked for, who waits, and who is sent away: in the order in which they came."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from worker.http.errors import Busy, ending

LONGEST = 60
"""Most seconds after which a client is told to ask again."""


class Line:
    """So many are worked for at once, and so many more may wait. For one event loop."""

    def __init__(self, places: int, waiting: int) -> None:
        self._places, self._most = places, places + waiting
        self._inside = self._working = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._seconds = deque[float](maxlen=16)
        """What the last ones took."""

    @property
    def working(self) -> int:
        """How many are worked for."""
        return self._working

    @property
    def waiting(self) -> int:
        """How many are here and are not worked for."""
        return max(0, self._inside - self._working)

    @contextmanager
    def ticket(self) -> Iterator[None]:
        """Counts one more to those who are here, until the block ends. Raises: Busy if there are too many."""
        if self._inside >= self._most:
            mean = sum(self._seconds) / max(1, len(self._seconds))
            after = min(LONGEST, max(1, math.ceil(mean / self._places)))
            raise Busy(f"{self._inside} requests are under way or wait, and no more may", after)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Waits for its turn, which lasts until the block ends. Raises: NotReady if the line closes first."""
        if self._working >= self._places:
            await self._turn()
        else:
            self._working += 1
        begun = time.monotonic()
        try:
            yield
        finally:
            self._seconds.append(time.monotonic() - begun)
            self._leave()

    def close(self) -> None:
        """Sends away who waits. Those who are worked for stay."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(ending())

    async def _turn(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._leave()  # the place came in the same moment
            raise

    def _leave(self) -> None:
        """Gives the place to the first who still waits."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._working -= 1
