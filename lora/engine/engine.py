"""Applies adapters to a pipeline's modules for the time of a block, and restores every bit afterwards.

There are two modes. Both compute W' = W + sum over the stack of scale * delta:

- dynamic: the weight is not touched. The layer's `forward` adds `up @ (down @ x)` to its output; the
  factors of the whole stack are concatenated along the rank, so several LoRAs cost one pair of products.
  A change without low-rank factors is merged instead, alone.
- merged: W' is computed in float32, rounded once and written into the weight's own storage. The original
  is copied before and copied back afterwards; nothing is ever subtracted. A layer whose weight
  cannot be written (quantised, offloaded) or belongs to several modules is applied dynamically.

The factors and merged weights of recent stacks are kept, up to a budget, under the hashes of their files.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lora.engine.dynamic import AdaptedForward
from lora.engine.merging import merge, refuse_overflow
from lora.engine.modes import choose_mode
from lora.engine.modules import as_matrix, shared_parameters, targets_of, writable
from lora.engine.originals import Originals
from lora.engine.plan import Merge, Plan, make_plan
from lora.engine.prepared import Merged, Prepared, bytes_of
from lora.engine.stack import Mode, Stack
from lora.engine.undo import RestoreFailed, Undo
from lora.errors import LoraUnsupported
from lora.formats.names.keys import KeyMap, Target
from lora.lru import ByteLru

__all__ = ["Block", "Budgets", "EngineBusy", "LoraEngine", "RestoreFailed"]

log = logging.getLogger(__name__)

GB = 1_000_000_000


@dataclass(frozen=True)
class Budgets:
    """How many bytes the engine may keep between blocks. What a block itself needs is not counted."""

    originals: int = 5 * GB
    """Copies of weights that were merged into."""
    prepared: int = 2 * GB
    """Factors and merged weights of stacks that were used."""


class EngineBusy(RuntimeError):
    """`applied` was entered while another block is open: a mistake in the program, not of a user."""


class LoraEngine:
    """Knows the modules of one pipeline and applies stacks of adapters to them, one stack at a time."""

    def __init__(self, components: Mapping[str, nn.Module], budgets: Budgets = Budgets()) -> None:
        """`components`: name (`unet`, `text_encoder`, ...) -> root module; the first one draws.

        No module is changed. Raises: ValueError if two modules would share a name.
        """
        self._modules = {
            (component, path): module
            for component, root in components.items()
            for path, module in root.named_modules()
        }
        self.shared = shared_parameters(components)
        """The ids of the parameters of several modules."""
        self._forwards: dict[nn.Module, AdaptedForward] = {}
        self._busy = threading.Lock()
        self.drawing = next(iter(components))
        """The component that denoises."""
        self.originals = Originals(budgets.originals)
        self.prepared: ByteLru[Prepared] = ByteLru(budgets.prepared)
        self.undo = Undo(self.originals)
        self.key_map = KeyMap(targets_of(components))
        """The names under which adapters may address the modules."""

    @contextmanager
    def applied(
        self, stack: Stack, mode: Mode = Mode.DYNAMIC, steps: int | None = None
    ) -> Iterator[Block]:
        """Applies the stack while the block runs. `Mode.AUTO` chooses by the number of `steps`.

        However the block ends, and also if applying fails, every parameter is afterwards bit for bit what it
        was, and every module has its own `forward` again. Raises: EngineBusy if a block is open already, in
        this thread or another; LoraIncompatible if a weight overflows; LoraUnsupported if a layer cannot be
        changed in the way that its algorithm needs; RestoreFailed if a weight of this block, or of an earlier
        one, cannot be restored.
        """
        with self.alone():
            self.undo.run()
            block = Block(self)
            try:
                block.switch(stack, mode, steps)
                yield block
            finally:
                self.undo.run()

    def settle(self) -> None:
        """Tries again to restore what an earlier block could not restore, if there is anything.

        Raises: RestoreFailed if it fails again: then the pipeline must not draw. EngineBusy.
        """
        if self.undo.pending:
            with self.alone():
                self.undo.run()

    def free(self) -> None:
        """Drops everything that is kept for later blocks. Raises: EngineBusy if a block is open."""
        with self.alone():
            self.prepared.clear()
            self.originals.forget()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps every other block out while this one runs. Raises: EngineBusy if another is open."""
        if not self._busy.acquire(blocking=False):
            raise EngineBusy("a stack of LoRAs is applied already; one block at a time")
        try:
            yield
        finally:
            self._busy.release()

    def choose(self, stack: Stack, mode: Mode, steps: int | None) -> Mode:
        """The mode in which a stack will be applied: `Mode.AUTO` resolved."""
        if mode is not Mode.AUTO:
            return mode
        weights = {
            weight
            for use in stack
            for layer in use.lora.layers
            if (weight := writable(self.module(layer.target), layer.parameter)) is not None
        }
        return choose_mode(
            ranged=any(use.ranged for use in stack),
            steps=steps,
            needed_bytes=self.originals.missing_bytes(list(weights)),
            device=next(iter(weights)).device if weights else torch.device("cpu"),
        )

    def module(self, target: Target) -> nn.Module:
        """The module that a target means."""
        return self._modules[target.component, target.path]

    def forward_of(self, module: nn.Module) -> AdaptedForward:
        """What replaces a module's `forward`: made once, since making hundreds takes milliseconds."""
        forward = self._forwards.get(module)
        if forward is None:
            forward = self._forwards[module] = AdaptedForward(module)
        return forward

    def prepare(self, stack: Stack, mode: Mode) -> tuple[Hashable, Prepared]:
        """What is kept of the stack's adapters in this mode, or a new `Prepared`; and its key."""
        key = (mode, *(use.lora.identity for use in stack))
        size = sum(file.size for file in {use.lora for use in stack})
        return key, self.prepared.get(key) or Prepared(size)


class Block:
    """The handle of an open `LoraEngine.applied`; only valid inside of it, and in its thread."""

    mode: Mode
    """How the stack was applied: `Mode.AUTO` resolved."""
    seconds: float
    """How long the last switch took."""

    def __init__(self, engine: LoraEngine) -> None:
        self._engine = engine
        self._stack: Stack = ()
        self._now: tuple[bool, ...] = ()
        """For each LoRA of the stack, whether the current step is within its range."""
        self._held: set[int] = set()
        """The indices of the LoRAs that were within their range at some step."""
        self._forced = 0

    @property
    def warnings(self) -> tuple[str, ...]:
        """Says where the stack was applied in another way than was asked for."""
        warning = f"{self._forced} layers are quantised or offloaded: applied dynamically"
        return (warning,) if self._forced else ()

    def never_held(self) -> list[int]:
        """The indices of the stack's LoRAs whose range has not contained any step so far."""
        return [index for index in range(len(self._stack)) if index not in self._held]

    def switch(self, stack: Stack, mode: Mode | None = None, steps: int | None = None) -> None:
        """Applies another stack in place of this one. Layers that both stacks change are written once.

        If it fails, neither stack is applied any more. Raises: as `LoraEngine.applied`.
        """
        begun = time.perf_counter()
        asked = mode or self.mode
        if any(use.ranged for use in stack) and asked is Mode.MERGED:
            self._engine.undo.run()
            self._stack, self._now = (), ()
            raise LoraUnsupported(
                "a LoRA for a part of the denoising cannot be merged",
                "Use the mode dynamic or auto, or leave out start and end.",
            )
        self._held.clear()
        self._switch_to(tuple(stack), tuple(use.holds(0.0) for use in stack), asked, steps)
        self.seconds = time.perf_counter() - begun

    def at(self, fraction: float) -> None:
        """Starts and ends LoRAs by their range. `fraction`: how much of the denoising is done, 0 to 1.

        Costs nothing where no LoRA starts or ends.
        """
        now = tuple(use.holds(fraction) for use in self._stack)
        if now != self._now:
            self._switch_to(self._stack, now, self.mode, None)

    def _switch_to(
        self, stack: Stack, now: tuple[bool, ...], mode: Mode, steps: int | None
    ) -> None:
        """Applies those LoRAs of the stack for which `now` is true."""
        engine = self._engine
        self._stack, self._now = (), ()  # true if it fails
        uses = [
            use if holds else use.without(engine.drawing)
            for use, holds in zip(stack, now, strict=True)
        ]
        try:
            self.mode = engine.choose(stack, mode, steps)
            self._apply([use for use in uses if use.scale])
        except BaseException:
            engine.undo.run()
            raise
        self._stack, self._now = stack, now
        self._held.update(index for index, holds in enumerate(now) if holds)

    def _apply(self, stack: Stack) -> None:
        engine = self._engine
        key, prepared = engine.prepare(stack, self.mode)
        make = partial(make_plan, stack, self.mode, engine.module, engine.shared)
        placed = prepared.place(stack, make, engine.forward_of)
        ready = prepared.ready(placed, stack)
        engine.undo.forwards(keep={module for module, _, _ in ready})
        for module, forward, added in ready:
            forward.set(engine.undo.replace_forward(module, forward), added)
        self._write(stack, placed.plan, prepared)
        self._forced = len(placed.plan.forced)
        engine.prepared.put(key, prepared, prepared.size)

    @torch.no_grad()
    def _write(self, stack: Stack, plan: Plan, prepared: Prepared) -> None:
        undo, originals = self._engine.undo, self._engine.originals
        undo.weights(keep=plan.merges.keys())
        written: dict[nn.Parameter, tuple[Merge, Tensor]] = {}
        ready, taken = prepared.merged(stack), 0
        for weight, entry in plan.merges.items():
            kept = ready.get(weight)
            content = kept.content if kept else entry.content_in(stack)
            if undo.content.get(weight) == content:
                continue
            original = originals.hold(weight)
            undo.content[weight] = None
            if kept and kept.generation == original.generation:
                weight.copy_(kept.values)
                taken += 1
            else:
                changes = [(one.layer.algorithm, one.scale_in(stack)) for one in entry.layers]
                view = as_matrix(entry.module, entry.name, weight.detach())
                total = merge(view, as_matrix(entry.module, entry.name, original.values), changes)
                written[weight] = entry, total
            undo.content[weight] = content
        refuse_overflow(written)
        if taken < len(plan.merges) and prepared.returns(stack):
            self._keep(stack, plan, prepared)

    def _keep(self, stack: Stack, plan: Plan, prepared: Prepared) -> None:
        """Keeps copies of the merged values for the next time, if the budget has room for the whole stack."""
        engine, have, content = self._engine, prepared.merged(stack), self._engine.undo.content
        generations = {one: engine.originals.hold(one).generation for one in plan.merges}
        if all(w in have and have[w].generation == g for w, g in generations.items()):
            return
        if bytes_of(plan.merges) + prepared.file_bytes > engine.prepared.budget:
            return
        try:
            copies = {
                one: Merged(one.detach().clone(), generation, content[one])
                for one, generation in generations.items()
            }
        except torch.OutOfMemoryError:
            log.warning("no memory to keep a merged stack ready; LORA_PREPARED_GB may be too large")
            prepared.drop()
            return
        prepared.keep(stack, copies, engine.prepared.budget)
