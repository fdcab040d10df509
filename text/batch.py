"""The texts that are under way: a prompt that is being read, and one step for all the others.

Between two steps one piece of one prompt is computed, of a size that takes about as long as one step, so
that nobody who is under way waits long for somebody who arrives.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora.engine.stack import Stack
from lora.errors import CodedError
from text.generation import Generation
from text.loading import TextModel
from text.sampling import choose
from text.slots import Slots

LARGEST_PIECE, SMALLEST_PIECE, FIRST_PIECE = 2048, 8, 16
"""The most and the fewest tokens of prompts that are computed at a time, and how many before one knows."""

QUICK, SLOW = 0.8, 1.1
"""A piece that took less than this share of a step was small, one that took more was large."""

PROMPTS = 8
"""How many prompts may be under way."""


class NotANumber(CodedError):
    """The model's output is no number: its precision does not suffice for what was asked."""

    code = "NOT_A_NUMBER"


class Filling(NamedTuple):
    """A text whose prompt is being read, in a row behind those of the running ones."""

    generation: Generation
    row: int


class Batch:
    """Rows 0 to n - 1 of the slots are the n texts that run; the last `PROMPTS` rows are for prompts."""

    def __init__(
        self, text: TextModel, most: int, on_end: Callable[[Generation], None] = lambda one: None
    ) -> None:
        """`most`: how many texts there may be. `on_end` is told of each that ends."""
        self._text, self._most, self._on_end = text, most, on_end
        self._slots = Slots(most + PROMPTS, text.device)
        self.live: list[Generation] = []
        self.filling: list[Filling] = []
        self.steps: deque[float] = deque(maxlen=64)
        """How long the latest steps took, in seconds."""
        self._apart = 0
        """How many prompts are to be read each by itself, after several together could not be."""
        self._size = float(FIRST_PIECE)
        """How many tokens of prompts take about as long as one step."""

    @property
    def count(self) -> int:
        """How many texts are in it."""
        return len(self.live) + len(self.filling)

    @property
    def takes_one(self) -> bool:
        """Whether another text may begin."""
        return len(self.filling) < PROMPTS and self.count < self._most

    def begin(self, generation: Generation) -> None:
        """Lets a text in; `takes_one` must hold."""
        taken = {one.row for one in self.filling}
        row = next(row for row in range(self._most, self._most + PROMPTS) if row not in taken)
        self.filling.append(Filling(generation, row))
        generation.begin(self._text)

    @torch.no_grad()
    def advance(self, use: Callable[[Sequence[Stack]], None]) -> None:
        """Computes a piece of the prompts, if there are any, and then a token of everybody who runs.

        `use` is told before each forward which row has which stack. Errors end the texts that they concern.
        """
        if self.filling:
            self._prefill(use)
        if self.live:
            self._step(use)

    def sweep(self) -> None:
        """Ends those who were cancelled, or whose time is over."""
        for generation in (*(one.generation for one in self.filling), *self.live):
            swept(generation)
        self._leave()

    def fail(self, error: BaseException) -> None:
        """Ends everybody with this error."""
        for generation in (*(one.generation for one in self.filling), *self.live):
            generation.end("error", error)
        self._leave()

    def _prefill(self, use: Callable[[Sequence[Stack]], None]) -> None:
        """Reads a piece of the first prompt, and with it the others that fit beside it whole.

        With the last piece of a prompt comes its text's first token.
        """
        pieces = self._pieces()
        begun, others = time.perf_counter(), bool(self.live)
        try:
            use([one.generation.stack for one, _ in pieces])
            logits = self._forward([one.row for one, _ in pieces], [piece for _, piece in pieces])
        except Exception as error:  # noqa: BLE001 - the one whose fault it is fails, the others go on
            self._apart = len(pieces) if len(pieces) > 1 else 0  # each alone will show whose it is
            if not self._apart:
                pieces[0][0].generation.end("error", error)
                self._leave()
            return
        read = [
            (one, row)
            for row, (one, _) in enumerate(pieces)
            if self._slots.lengths[one.row] == len(one.generation.prompt)
        ]
        for one, _ in read:
            self._slots.move(one.row, len(self.live))
            self.live.append(one.generation)
            self.filling.remove(one)
        if read:
            self._take([one.generation for one, _ in read], logits[[row for _, row in read]])
        elif self.live:
            logits.sum().item()  # waits for the device, so that the time is true
        if others:
            self._learn(len(pieces) * len(pieces[0][1]), time.perf_counter() - begun)

    def _learn(self, tokens: int, seconds: float) -> None:
        """Fits the size of pieces to what one took while others ran.

        A forward has a cost of its own, whatever its tokens: so the size is tried, and not computed.
        """
        step = statistics.median(self.steps) if self.steps else 0.0
        if seconds > SLOW * step:
            self._size = max(SMALLEST_PIECE, min(self._size, tokens) * max(0.5, step / seconds))
        elif seconds < QUICK * step and tokens > 0.7 * self._size:
            self._size = min(LARGEST_PIECE, 1.5 * self._size)

    def _pieces(self) -> list[tuple[Filling, Sequence[int]]]:
        """Who is read now, and which tokens of each; the first piece is the longest."""
        budget = self._budget()
        rests = [one.generation.prompt[self._slots.lengths[one.row] :] for one in self.filling]
        first = rests[0][:budget]
        pieces: list[tuple[Filling, Sequence[int]]] = [(self.filling[0], first)]
        if self._apart:
            self._apart -= 1
            return pieces
        for one, rest in zip(self.filling[1:], rests[1:], strict=True):
            if len(rest) <= len(first) and (len(pieces) + 1) * len(first) <= budget:
                pieces.append((one, rest))
        return pieces

    def _budget(self) -> int:
        """How many tokens of prompts take about as long as one step."""
        return int(self._size) if self.live else LARGEST_PIECE

    def _step(self, use: Callable[[Sequence[Stack]], None]) -> None:
        begun = time.perf_counter()
        live = list(self.live)
        try:
            use([g.stack for g in live])
            logits = self._forward(range(len(live)), [[g.tokens[-1]] for g in live])
            self._take(live, logits)
        except Exception as error:  # noqa: BLE001 - nobody can say whose fault it was
            for generation in live:
                generation.end("error", error)
            self._leave()
        self.steps.append(time.perf_counter() - begun)

    def _forward(self, at: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """The logits behind the last token of each row, [rows, vocabulary]."""
        sizes, device = [len(row) for row in tokens], self._text.device
        new = max(sizes)
        ready = self._slots.begin(at, sizes)
        last = sorted({size - 1 for size in sizes})
        out = self._text.model(
            input_ids=torch.tensor(
                [[*row, *[0] * (new - len(row))] for row in tokens], device=device
            ),
            attention_mask=ready.mask,
            position_ids=ready.positions,
            past_key_values=self._slots,
            use_cache=True,
            logits_to_keep=1 if last == [new - 1] else torch.tensor(last, device=device),
        )
        self._slots.end()
        logits: Tensor = out.logits
        if len(last) == 1:
            return logits[:, -1]
        return logits[range(len(sizes)), [last.index(size - 1) for size in sizes]]

    def _take(self, generations: Sequence[Generation], logits: Tensor) -> None:
        """Chooses everybody's next token; those who are done leave."""
        tokens = choose(logits, [g.chooser for g in generations])
        for generation, chosen in zip(generations, tokens, strict=True):
            try:
                if chosen is None:
                    hint = "Lower the scale of the LoRAs."
                    raise NotANumber("the model's output is no number", hint)
                generation.take(chosen)
            except Exception as error:  # noqa: BLE001 - this text fails, the others go on
                generation.end("error", error)
        self._leave()

    def _leave(self) -> None:
        """Takes out the rows of texts that have ended; the last row moves into each gap."""
        gone = [one for one in self.filling if one.generation.finish is not None]
        for one in gone:
            self.filling.remove(one)
            self._slots.free(one.row)
            self._on_end(one.generation)
        for place in reversed(range(len(self.live))):
            generation = self.live[place]
            if generation.finish is None:
                continue
            self._slots.free(place)
            last = self.live.pop()
            if last is not generation:
                self._slots.move(len(self.live), place)
                self.live[place] = last
            self._on_end(generation)


def swept(generation: Generation) -> bool:
    """Ends a text that was cancelled, or whose time is over; whether it has ended."""
    try:
        generation.check()
    except CodedError as error:
        generation.end("error", error)
    return generation.finish is not None
