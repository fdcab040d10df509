"""Draws frames with one engine while the LoRAs change between them.

One by one, a frame's stack is switched to before its first step, and the picture is bit for bit what the
frame would give alone. In a stream batch the frames under way, each at another step, share every forward.
The batch's layout is fixed: all adapters of the session side by side, as many rows as there are steps, blank
ones where no frame is. So a frame is bit for bit what it would be in a stream all under its own stack, and
what arrives changes no frame under way.

Prompts are encoded apart from the drawing, under the part of the stack that changes the text encoders, and
kept: a LoRA that leaves the text encoders alone costs no encoding, nor does coming back to a prompt.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from PIL import Image

from live.looks import DRAWING, Look
from live.queue import Waiting
from lora.engine.engine import Block, LoraEngine
from lora.engine.rows import Rows
from lora.engine.stack import Mode, Stack
from lora.formats.adapter import LoraFile
from pipelines.live import Frame, LiveStream
from pipelines.prompts import Conditions

MEANINGS = 32
"""How many encoded prompts are kept."""

BESIDE = 16
"""The most adapters that a stream batch has columns for; beyond them, the one used longest ago makes room."""


@dataclass(eq=False)
class Ticket:
    """A frame to be drawn."""

    waiting: Waiting
    look: Look
    picture: Image.Image | None
    """What it starts from; None to begin with noise."""


@dataclass
class Drawn:
    """A finished frame."""

    ticket: Ticket
    image: Image.Image
    switch_seconds: float
    how: str
    """`dynamic`, `merged`, `row` or `baked`."""
    alone: str | None = None
    """Why it was drawn alone, where a stream batch was asked for."""


@dataclass(eq=False)
class _Entered:
    """A frame in a stream batch."""

    ticket: Ticket
    frame: Frame
    switch_seconds: float


class Painter:
    """Draws a session's frames. All methods are called by the thread that holds the session's turn."""

    def __init__(
        self,
        stream: LiveStream,
        engine: LoraEngine,
        finished: Callable[[Drawn], None],
        *,
        mode: Mode = Mode.DYNAMIC,
        stream_batch: bool = False,
        baked: Look | None = None,
    ) -> None:
        """`finished` gets each frame as soon as it is drawn. `baked`: merged while the painter is open; then
        no look changes a LoRA.
        """
        self._finished = finished
        self._stream, self._engine, self._mode, self._baked = stream, engine, mode, baked
        self._batched = stream_batch
        self._rows = Rows(engine, component=DRAWING)
        self._beside: OrderedDict[str, LoraFile] = OrderedDict()
        self._meanings: OrderedDict[Hashable, Conditions] = OrderedDict()
        self._slots: list[_Entered | None] = [None] * stream.spec.steps
        """The frames under way; slot i is the one that takes step i next."""
        self._misfits: dict[str, str | None] = {}
        self._exits = ExitStack()
        self._block: Block | None = None
        self._in_rows = False
        self._switched = 0.0

    @property
    def under_way(self) -> bool:
        """Whether a stream batch has frames that are not finished."""
        return any(self._slots)

    def close(self) -> None:
        """Puts every weight and module back. Frames under way stay, and go on with the next call.

        Raises: RestoreFailed.
        """
        self._block, self._in_rows = None, False
        self._exits.close()

    def abandon(self) -> list[Ticket]:
        """Gives up the frames under way, and returns their tickets."""
        lost = [slot.ticket for slot in self._slots if slot]
        self._slots = [None] * len(self._slots)
        return lost

    def warm(self, look: Look) -> None:
        """Draws a frame of a look and throws it away: afterwards its first frame is like any other."""
        finished, self._finished = self._finished, lambda drawn: None
        try:
            self.draw(Ticket(Waiting(None, b"", look), look, None))
            self.drain()
        finally:
            self._finished = finished

    def draw(self, ticket: Ticket) -> None:
        """Takes a frame in. One by one it is finished by that; in a stream batch an earlier one may be.

        Raises: CodedError if this frame cannot be drawn, and then no other has come to harm. After any other
        error, frames under way may be spoilt (`abandon`).
        """
        self._switched = 0.0
        if not self._batched:
            self._alone(ticket)
        elif reason := self._misfit(ticket.look):
            self.drain()
            self._alone(ticket, reason)
        else:
            conditions = self._conditions(ticket.look)
            self._make_way(ticket.look, conditions)
            self._tick(_Entered(ticket, self._begin(ticket, conditions), 0.0))

    def tick(self) -> None:
        """Takes the frames under way one step on, where none comes in."""
        self._tick(None)

    def drain(self) -> None:
        """Finishes the frames under way."""
        while self.under_way:
            self.tick()

    def _misfit(self, look: Look) -> str | None:
        """Why a look cannot share a batch."""
        for file in () if self._baked else look.files:
            if file.identity not in self._misfits:
                self._misfits[file.identity] = self._rows.misfit(file)
            if reason := self._misfits[file.identity]:
                return reason
        return None

    def _begin(self, ticket: Ticket, conditions: Conditions) -> Frame:
        stream = self._stream
        latents = None if ticket.picture is None else stream.encode(ticket.picture)
        return stream.begin(latents, stream.noise(ticket.look.seed), conditions)

    def _alone(self, ticket: Ticket, reason: str | None = None) -> None:
        stream, steps = self._stream, self._stream.spec.steps
        conditions = self._conditions(ticket.look)
        frame = self._begin(ticket, conditions)
        for step in range(steps):
            self._switch(ticket.look.drawing(step / steps))
            stream.step([frame])
        how = self._mode if reason is None else Mode.DYNAMIC
        image = stream.decode(frame.latents)
        self._finished(Drawn(ticket, image, self._switched, self._how(how.value), reason))

    def _how(self, how: str) -> str:
        return "baked" if self._baked else how

    def _tick(self, entered: _Entered | None) -> None:
        slots = [entered, *self._slots[1:]]
        like = next((slot.frame.conditions for slot in slots if slot), None)
        if like is None:
            return
        frames = [
            slot.frame if slot else self._stream.blank(like, step)
            for step, slot in enumerate(slots)
        ]
        if not self._baked:
            self._place(slots)
            if entered:
                entered.switch_seconds = self._switched
        else:
            self._open_block()
        self._stream.step(frames)
        done = slots[-1]
        image = self._stream.decode(done.frame.latents) if done else None
        self._slots = [None, *slots[:-1]]
        if done and image:
            self._finished(Drawn(done.ticket, image, done.switch_seconds, self._how("row")))

    def _place(self, slots: Sequence[_Entered | None]) -> None:
        """Gives each row of the next step its frame's stack."""
        steps = range(len(slots))
        stacks: list[Stack] = []
        for row in self._stream.rows(steps):
            slot = slots[row.frame]
            stacks.append(slot.ticket.look.drawing(row.frame / len(slots)) if slot else ())
        begun = time.perf_counter()
        if not self._in_rows:
            self.close()
            self._exits.enter_context(self._rows.opened())
            self._in_rows = True
        self._rows.use(stacks, tuple(self._beside.values()))
        self._switched += time.perf_counter() - begun

    def _make_way(self, look: Look, conditions: Conditions) -> None:
        """Drains the batch where a frame cannot join: it brings an adapter, or a prompt of other length."""
        missing = [file for file in look.files if file.identity not in self._beside]
        under_way = next((slot.frame.conditions for slot in self._slots if slot), None)
        length = conditions.prompt_embeds.shape[1]
        joins = under_way is None or under_way.prompt_embeds.shape[1] == length
        if (missing and not self._baked) or not joins:
            self.drain()
            self._switched = 0.0
        for file in look.files:
            self._beside[file.identity] = file
            self._beside.move_to_end(file.identity)
        while len(self._beside) > max(BESIDE, len(look.files)):
            self._beside.popitem(last=False)

    def _open_block(self) -> Block:
        if self._block is None:
            self.close()
            baked = self._baked.stack if self._baked else ()
            mode = Mode.MERGED if self._baked else self._mode
            self._block = self._exits.enter_context(self._engine.applied(baked, mode))
        return self._block

    def _switch(self, stack: Stack) -> None:
        block = self._open_block()
        if not self._baked:
            begun = time.perf_counter()
            block.switch(stack)
            self._switched += time.perf_counter() - begun

    def _conditions(self, look: Look) -> Conditions:
        kept = self._meanings.get(look.meaning)
        if kept is None:
            if look.speaking or self._baked:
                self._switch(look.speaking)
            with self._stream.tokens(look.words):
                kept = self._stream.conditions(look.prompt, look.negative)
            self._meanings[look.meaning] = kept
            if len(self._meanings) > MEANINGS:
                self._meanings.popitem(last=False)
        self._meanings.move_to_end(look.meaning)
        return kept
