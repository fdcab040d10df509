"""Who computes when: a queue, and turns.

Requests are served in the order in which they came. All whose stacks are low-rank share one batch. A stack
that is not takes a turn alone: those before it end, it is applied, the requests for it that are queued by
then run, and every weight is put back before the next in the queue begin.
"""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from lora.engine.engine import LoraEngine, RestoreFailed
from lora.engine.rows import Rows
from lora.engine.stack import Mode, Stack
from lora.errors import CodedError
from text.batch import Batch, swept
from text.generation import Generation
from text.loading import TextModel

PLACING = 0.3
"""The share of a step that is spent, between two of them, on placing the adapters of who comes next."""


class Closed(CodedError):
    """The worker ends, or cannot go on."""

    code = "WORKER_CLOSED"


class Scheduler:
    """Runs the model in a thread of its own."""

    def __init__(
        self,
        text: TextModel,
        engine: LoraEngine,
        most: int = 16,
        on_end: Callable[[Generation], None] = lambda generation: None,
    ) -> None:
        """`most`: how many texts are under way at once. `on_end` is told of each that ends."""
        self._engine, self._on_end = engine, on_end
        self.rows = Rows(engine)
        self.batch = Batch(text, most, on_end)
        self._queue: deque[Generation] = deque()
        self._news = threading.Condition()
        self.closed: BaseException | None = None
        """Why no text is taken any more."""
        self._thread = threading.Thread(target=self._run, name="text", daemon=True)
        self._thread.start()

    # --- from any thread ------------------------------------------------------------------------

    def submit(self, *generations: Generation) -> None:
        """Puts texts at the end of the queue. Raises: Closed."""
        with self._news:
            if self.closed is not None:
                raise Closed("this worker takes no more texts", "Try again.") from self.closed
            self._queue.extend(generations)
            self._news.notify()

    def close(self) -> None:
        """Ends every text that is queued or under way, and the thread."""
        with self._news:
            self.closed = self.closed or Closed("the worker ends")
            self._news.notify()
        self._thread.join()

    @property
    def counts(self) -> dict[str, int]:
        """How many texts wait, and how many are under way."""
        return {"queued": len(self._queue), "running": self.batch.count}

    # --- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait():
            turn = {self._queue[0]}
            try:
                self._turn(turn)
            except BaseException as error:  # noqa: BLE001 - every text must end
                if isinstance(error, RestoreFailed) or not isinstance(error, Exception):
                    self.closed = self.closed or error
                self.batch.fail(error)
                self._end_queued(error, turn)
        ended = self.closed or Closed("the worker ends")
        self.batch.fail(ended)
        self._end_queued(ended, list(self._queue))

    def _wait(self) -> bool:
        with self._news:
            while not self._queue and self.closed is None:
                self._news.wait()
            return self.closed is None

    def _turn(self, turn: set[Generation]) -> None:
        """Serves the head of the queue, which `turn` holds, and all who can be served with it.

        A turn alone adds those that it is for to `turn`: they end if it fails.
        """
        (head,) = turn
        stack = self._alone(head)
        if stack is None:
            return self._serve(self.rows.opened(), None)
        with self._news:
            turn.update(one for one in self._queue if _key(one.stack) == _key(stack))
        return self._serve(self._engine.applied(stack, Mode.DYNAMIC), turn)

    def _alone(self, generation: Generation) -> Stack | None:
        """The stack of a text that cannot share a batch; None if it can."""
        uses = [use for use in generation.stack if any(use.factors)]
        return uses if any(self.rows.misfit(use.lora) for use in uses) else None

    def _serve(self, block: AbstractContextManager[Any], only: set[Generation] | None) -> None:
        """Runs until nobody is left who may be served in this block. `only`: those of a turn alone."""
        use = self.rows.use if only is None else _nothing
        with block:
            while self.closed is None:
                self._sweep()
                while self.batch.takes_one and (head := self._next(only)):
                    self.batch.begin(head)
                if not self.batch.count:
                    return
                self.batch.advance(use)

    def _next(self, only: set[Generation] | None) -> Generation | None:
        """Takes the next text that may be served in this block out of the queue."""
        with self._news:
            queue = self._queue
            if only is not None:
                head = next((one for one in queue if one in only), None)
            else:
                head = queue[0] if queue and self._alone(queue[0]) is None else None
        if head is None or (only is None and not self._is_placed(head)):
            return None
        with self._news:  # this thread alone takes texts out
            queue.remove(head)
        return head

    def _is_placed(self, generation: Generation) -> bool:
        """Whether its adapters are in their places. While others run they are put there bit by bit, in a
        share of each turn, so that nobody waits for all of it.
        """
        if not self.batch.live:
            return True
        seconds = PLACING * statistics.median(self.batch.steps or [0.0])
        try:
            files = [use.lora for use in generation.stack if any(use.factors)]
            return all(self.rows.place_for(file, seconds) for file in files)
        except Exception:  # noqa: BLE001 - its own turn will show it, and end it alone
            return True

    def _sweep(self) -> None:
        self.batch.sweep()
        with self._news:
            gone = [one for one in self._queue if swept(one)]
            for one in gone:
                self._queue.remove(one)
        for one in gone:
            self._on_end(one)

    def _end_queued(self, error: BaseException, those: Collection[Generation]) -> None:
        with self._news:
            gone = [one for one in self._queue if one in those]
            for one in gone:
                self._queue.remove(one)
        for one in gone:
            one.end("error", error)
            self._on_end(one)


def _nothing(stacks: Sequence[Stack]) -> None:
    """In a turn alone the stack is applied already."""


def _key(stack: Stack) -> Hashable:
    return tuple((use.lora.identity, use.all_scales) for use in stack if any(use.factors))
