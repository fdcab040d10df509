"""Applies adapters to a pipeline's modules for the time of a block, and puts every bit back.

Two ways, with one meaning, W' = W + sum over the stack of scale * delta:

- dynamic: the weight is not touched. The layer's `forward` adds `up @ (down @ x)` to its output; the
  factors of the whole stack are concatenated along the rank, so several LoRAs cost one pair of products.
  A part without low-rank factors is merged instead, alone.
- merged: W' is computed in float32, rounded once and written into the weight's own storage. The original
  was copied aside before and is copied back afterwards; nothing is ever subtracted. A layer whose weight
  cannot be written (quantised, offloaded) or belongs to several modules is applied dynamically.

What a stack needs is kept ready in a bounded memory, by the files' contents, so that coming back to it
rebuilds nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora.engine.dynamic import AdaptedForward
from lora.engine.merging import merge
from lora.engine.modes import choose_mode
from lora.engine.modules import as_matrix, shared_parameters, targets_of, tree, writable
from lora.engine.originals import Originals
from lora.engine.plan import Merge, Plan, make_plan
from lora.engine.prepared import Merged, Prepared
from lora.engine.stack import Mode, Stack
from lora.engine.undo import RestoreFailed, Undo
from lora.errors import LoraIncompatible, LoraUnsupported
from lora.formats.names.keys import KeyMap, Target
from lora.lru import ByteLru

__all__ = ["Block", "Budgets", "EngineBusy", "LoraEngine", "RestoreFailed"]

log = logging.getLogger(__name__)

GB = 1_000_000_000


@dataclass(frozen=True)
class Budgets:
    """How many bytes the engine may keep between blocks. What is needed within one is not counted."""

    originals: int = 5 * GB
    """Copies of weights that were merged into."""
    prepared: int = 2 * GB
    """Factors and merged weights of stacks that were used."""


class EngineBusy(RuntimeError):
    """`applied` was entered while another block is open: a mistake of the program, not of a user."""


class LoraEngine:
    """Knows the modules of one pipeline and applies stacks of adapters to them, one stack at a time."""

    def __init__(self, components: Mapping[str, nn.Module], budgets: Budgets = Budgets()) -> None:
        """`components`: name (`unet`, `text_encoder`, ...) -> root module, the one that draws first.

        Nothing is changed. Raises: ValueError if two modules would share a name.
        """
        self._modules = dict(tree(components))
        self._shared = shared_parameters(components)
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
        """Applies the stack while the block runs. `steps` helps `Mode.AUTO` to choose.

        After the block, left by whatever way, and after a failure to apply, every parameter is bit for
        bit what it was and every module has its own `forward` again. Raises: EngineBusy if a block is
        open already, in this thread or another; LoraIncompatible if a weight overflows; LoraUnsupported
        if a layer cannot be changed in the way that its part needs; RestoreFailed if a weight cannot be
        put back, be it one of an earlier block.
        """
        with self._alone():
            self.undo.run()
            block = Block(self)
            try:
                block.switch(stack, mode, steps)
                yield block
            finally:
                self.undo.run()

    def settle(self) -> None:
        """Tries again to put back what an earlier block could not; does nothing if there is nothing.

        Raises: RestoreFailed if it still cannot; then the pipeline must not draw. EngineBusy.
        """
        if self.undo.pending:
            with self._alone():
                self.undo.run()

    def free(self) -> None:
        """Drops what is kept ready for later blocks. Raises: EngineBusy if a block is open."""
        with self._alone():
            self.prepared.clear()
            self.originals.forget()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise EngineBusy("a stack of LoRAs is applied already; one block at a time")
        try:
            yield
        finally:
            self._busy.release()

    def choose(self, stack: Stack, mode: Mode, steps: int | None) -> Mode:
        """The way that a stack will go: `Mode.AUTO` resolved."""
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
        """What stands in for a module's `forward`: one object per module for ever."""
        found = self._forwards.get(module)
        if found is None:
            found = self._forwards[module] = AdaptedForward(module)
        return found

    def prepare(self, stack: Stack, mode: Mode) -> tuple[Hashable, Prepared]:
        """What the stack needs, from an earlier time if it was used before, and the key to keep it by."""
        strengths = tuple(use.strengths for use in stack)
        key: tuple[Hashable, ...] = (mode, *(use.lora.identity for use in stack))
        if mode is Mode.MERGED:  # merged weights are made for one scale, factors for any
            key = (*key, strengths)
        kept = self.prepared.get(key)
        if kept is not None and kept.strengths == strengths and not kept.plan.is_stale():
            return key, kept
        plan = make_plan(stack, mode, self.module, self._shared)
        size = sum(file.size for file in {use.lora for use in stack})
        return key, Prepared(plan, strengths, size, factors=kept.factors if kept else {})


class Block:
    """What is applied while `LoraEngine.applied` is open; only valid there, and in its thread."""

    mode: Mode
    """How the stack was applied: `Mode.AUTO` resolved."""
    layers: int
    """How many modules are changed, by all adapters together."""
    seconds: float
    """How long the last switch took."""

    def __init__(self, engine: LoraEngine) -> None:
        self._engine = engine
        self._stack: Stack = ()
        self._now: tuple[bool, ...] = ()
        """Which of the stack's LoRAs are within their range."""
        self._held: set[int] = set()
        """Which of them ever were."""
        self._forced = 0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was done in another way than asked for."""
        if not self._forced:
            return ()
        return (f"{self._forced} layers are quantised or offloaded: applied dynamically",)

    def never_held(self) -> list[int]:
        """Which LoRAs of the stack, by their place, had a range without a moment so far."""
        return [place for place in range(len(self._stack)) if place not in self._held]

    def switch(self, stack: Stack, mode: Mode | None = None, steps: int | None = None) -> None:
        """Applies another stack in place of this one; layers that both change are written once.

        If it fails, nothing of either stack is applied any more. Raises: as `LoraEngine.applied`.
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
        self._go(tuple(stack), tuple(use.holds(0.0) for use in stack), asked, steps)
        self.seconds = time.perf_counter() - begun

    def at(self, fraction: float) -> None:
        """Tells how much of the denoising is done, 0 to 1: LoRAs with a range come and go.

        Does nothing, at no cost, where that changes nothing.
        """
        now = tuple(use.holds(fraction) for use in self._stack)
        if now != self._now:
            self._go(self._stack, now, self.mode, None)

    def _go(
        self,
        stack: Stack,
        now: tuple[bool, ...],
        mode: Mode,
        steps: int | None,
    ) -> None:
        """Applies the stack, of which those are there that `now` says."""
        engine = self._engine
        self._stack, self._now = (), ()  # what holds if it fails
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
        self._held.update(place for place, holds in enumerate(now) if holds)

    def _apply(self, stack: Stack) -> None:
        engine = self._engine
        key, prepared = engine.prepare(stack, self.mode)
        plan = prepared.plan
        ready = prepared.ready(engine.forward_of)
        engine.undo.forwards(keep={one.module for one in ready})
        for module, forward, factors in ready:
            forward.set(engine.undo.replace_forward(module, forward), factors)
        self._write(stack, plan, prepared)
        self._forced, self.layers = len(plan.forced), plan.modules
        engine.prepared.put(key, prepared, prepared.size)

    @torch.no_grad()
    def _write(self, stack: Stack, plan: Plan, prepared: Prepared) -> None:
        undo, originals = self._engine.undo, self._engine.originals
        undo.weights(keep=plan.merges.keys())
        written: dict[nn.Parameter, tuple[Merge, Tensor]] = {}
        for weight, entry in plan.merges.items():
            content = tuple(
                (stack[part.use].lora.identity, part.layer.target, part.scale)
                for part in entry.parts
            )
            if undo.content(weight) == content:
                continue
            generation, kept = originals.generation(weight), prepared.merged.get(weight)
            original = originals.hold(weight)
            undo.note(weight, None)
            if kept and kept.generation == generation:
                weight.copy_(kept.values)
            else:
                parts = [(part.layer.algorithm, part.scale) for part in entry.parts]
                view = as_matrix(entry.module, entry.name, weight.detach())
                total = merge(view, as_matrix(entry.module, entry.name, original), parts)
                written[weight] = entry, total
            undo.note(weight, content)
        _check_overflow(written)
        self._keep(plan, prepared)

    def _keep(self, plan: Plan, prepared: Prepared) -> None:
        """Keeps the merged values for the next time, if the budget has room for the whole stack."""
        engine = self._engine
        size = sum(weight.numel() * weight.element_size() for weight in plan.merges)
        if size + prepared.size - prepared.merged_size > engine.prepared.budget:
            return
        try:
            for weight in plan.merges:
                generation = engine.originals.generation(weight)
                kept = prepared.merged.get(weight)
                if kept is None or kept.generation != generation:
                    prepared.merged[weight] = Merged(weight.detach().clone(), generation)
        except torch.OutOfMemoryError:
            log.warning("no memory to keep a merged stack ready; LORA_PREPARED_GB may be too large")
            prepared.merged.clear()


def _check_overflow(written: Mapping[nn.Parameter, tuple[Merge, Tensor]]) -> None:
    """Raises: LoraIncompatible with the first layer whose merged weight does not fit its precision."""
    by_device: dict[torch.device, list[nn.Parameter]] = defaultdict(list)
    for weight, (_, total) in written.items():
        by_device[total.device].append(weight)
    for weights in by_device.values():
        sums = torch.stack([written[weight][1] for weight in weights])  # one wait for the device
        for weight, finite in zip(weights, sums.isfinite().tolist(), strict=True):
            if not finite and not bool(weight.detach().float().isfinite().all()):
                entry = written[weight][0]
                raise LoraIncompatible(
                    f"with these LoRAs the {entry.name} of {entry.target} overflows "
                    f"{str(weight.dtype).removeprefix('torch.')}",
                    "Lower the scale.",
                )
