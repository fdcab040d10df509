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

import threading
import time
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora.algorithms import LowRank
from lora.dynamic import AdaptedForward, Factors, make_factors, set_scales
from lora.errors import CodedError, LoraIncompatible, LoraUnsupported
from lora.files import Layer
from lora.keys import KeyMap, Target
from lora.lru import ByteLru
from lora.merging import merge
from lora.modules import (
    as_matrix,
    shared_parameters,
    takes_low_rank,
    targets_of,
    tree,
    writable,
)
from lora.originals import Originals
from lora.stack import LoraUse, Mode, Stack

GB = 1_000_000_000


@dataclass(frozen=True)
class Budgets:
    """How many bytes the engine may keep between blocks. What is needed within one is not counted."""

    originals: int = 5 * GB
    """Copies of weights that were merged into."""
    prepared: int = 2 * GB
    """Factors and merged weights of stacks that were used."""


class RestoreFailed(CodedError):
    """A weight could not be put back: the pipeline must not draw again. The process should end."""

    code = "INTERNAL"


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
        self._drawing = next(iter(components))
        self._forwards: dict[nn.Module, AdaptedForward] = {}
        self._originals = Originals(budgets.originals)
        self._prepared: ByteLru[_Prepared] = ByteLru(budgets.prepared)
        self._busy = threading.Lock()
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
        if a layer cannot be changed in the way that its part needs; RestoreFailed.
        """
        if not self._busy.acquire(blocking=False):
            raise EngineBusy("a stack of LoRAs is applied already; one block at a time")
        block = Block(self)
        try:
            block.switch(stack, mode, steps)
            yield block
        finally:
            try:
                block.close()
            finally:
                self._busy.release()

    def free(self) -> None:
        """Drops what is kept ready for later blocks. Raises: EngineBusy if a block is open."""
        if not self._busy.acquire(blocking=False):
            raise EngineBusy("a stack of LoRAs is applied; nothing can be freed")
        try:
            self._prepared.clear()
            self._originals.forget()
        finally:
            self._busy.release()

    # --- deciding ---------------------------------------------------------------------------------

    def choose(self, stack: Stack, mode: Mode, steps: int | None) -> Mode:
        """The way that a stack will go: `Mode.AUTO` resolved."""
        if mode is not Mode.AUTO:
            return mode
        weights = {
            weight
            for use in stack
            for layer in use.file.layers
            if (weight := writable(self._module(layer.target), layer.parameter)) is not None
        }
        return choose_mode(
            ranged=any(use.ranged for use in stack),
            steps=steps,
            needed_bytes=self._originals.missing_bytes(list(weights)),
            device=next(iter(weights)).device if weights else torch.device("cpu"),
        )

    def _plan(self, stack: Stack, mode: Mode) -> _Plan:
        """What is to be done to which module. Changes nothing. Raises: LoraUnsupported."""
        parts: dict[tuple[Target, str], list[_Part]] = defaultdict(list)
        for number, use in enumerate(stack):
            scales: dict[Target, float] = {}
            for layer in use.file.layers:
                scale = scales.get(layer.target)
                if scale is None:
                    scale = scales[layer.target] = use.scale_of(layer.target)
                if scale:
                    parts[layer.target, layer.parameter].append(_Part(layer, number, scale))
        plan = _Plan()
        for (target, name), found in parts.items():
            module = self._module(target)
            weight = writable(module, name)
            low_rank = self._goes_dynamic(module, name, weight, mode)
            dynamic = tuple(p for p in found if low_rank and p.layer.part.is_low_rank)
            if dynamic:
                plan.dynamic.append(_Dynamic(module, dynamic))
                if mode is Mode.MERGED and weight is None:
                    plan.forced.append((module, name))
            to_merge = [p for p in found if p not in dynamic] if dynamic else found
            if to_merge and weight is None:
                raise LoraUnsupported(
                    f"{target} is quantised or offloaded, and {to_merge[0].layer.part.name} needs its "
                    f"{name} itself",
                    "Only LoRA without extras can be applied to such layers.",
                )
            if to_merge and weight is not None:
                # By weight, not by module: what is shared must be rounded once.
                merges = plan.merges.setdefault(weight, _Merge(module, name, target, []))
                merges.parts.extend(to_merge)
        plan.modules = len({target for target, _ in parts})
        return plan

    def _goes_dynamic(
        self, module: nn.Module, name: str, weight: nn.Parameter | None, mode: Mode
    ) -> bool:
        """Whether what is low-rank of a layer is added in its forward."""
        if name != "weight" or not takes_low_rank(module):
            return False
        return mode is Mode.DYNAMIC or weight is None or id(weight) in self._shared

    def _module(self, target: Target) -> nn.Module:
        return self._modules[target.component, target.path]

    # --- preparing --------------------------------------------------------------------------------

    def _prepare(self, stack: Stack, mode: Mode) -> tuple[Hashable, _Prepared]:
        """What the stack needs, from an earlier time if it was used before."""
        strengths = tuple(use.strengths for use in stack)
        key: tuple[Hashable, ...] = (mode, *(use.file.identity for use in stack))
        if mode is Mode.MERGED:  # merged weights are made for one scale, factors for any
            key = (*key, strengths)
        prepared = self._prepared.get(key) or _Prepared()
        plan = prepared.plan
        if plan is None or prepared.strengths != strengths or plan.is_stale():
            prepared.plan = self._plan(stack, mode)
            prepared.file_bytes = sum(use.file.size for use in stack)
            prepared.strengths = strengths
            prepared.merged, prepared.ready = {}, None
        return key, prepared

    def _make_ready(self, plan: _Plan, prepared: _Prepared) -> list[_Ready]:
        """The plan's dynamic layers with their factors, made where they are missing, and scales."""
        keys = [(e.module, tuple(part.use for part in e.parts)) for e in plan.dynamic]
        missing = [
            (key, e)
            for key, e in zip(keys, plan.dynamic, strict=True)
            if key not in prepared.factors
        ]
        made = make_factors([(e.module, [_low_rank(p) for p in e.parts]) for _, e in missing])
        prepared.factors.update(zip((key for key, _ in missing), made, strict=True))
        ready = []
        for key, (module, _) in zip(keys, plan.dynamic, strict=True):
            forward = self._forwards.get(module)
            if forward is None:
                forward = self._forwards[module] = AdaptedForward(module)
            ready.append(_Ready(module, forward, prepared.factors[key]))
        scales = [[part.scale for part in entry.parts] for entry in plan.dynamic]
        set_scales([(one.factors, own) for one, own in zip(ready, scales, strict=True)])
        return ready


class _Part(NamedTuple):
    layer: Layer
    use: int
    """Which of the stack's uses it comes from."""
    scale: float


class _Dynamic(NamedTuple):
    """All that a stack adds to one module's output."""

    module: nn.Module
    parts: tuple[_Part, ...]


class _Ready(NamedTuple):
    """A module, what stands in for its `forward`, and with what."""

    module: nn.Module
    forward: AdaptedForward
    factors: Factors


@dataclass(frozen=True)
class _Merge:
    """All that a stack does to one weight."""

    module: nn.Module
    name: str
    target: Target
    parts: list[_Part]


@dataclass
class _Plan:
    dynamic: list[_Dynamic] = field(default_factory=list)
    merges: dict[nn.Parameter, _Merge] = field(default_factory=dict)
    modules: int = 0
    forced: list[tuple[nn.Module, str]] = field(default_factory=list)
    """The layers that go dynamic although the stack is merged, since their weight cannot be written."""

    def is_stale(self) -> bool:
        """Whether a module has another parameter than when this was made, or it can be written now."""
        replaced = any(
            writable(m.module, m.name) is not weight for weight, m in self.merges.items()
        )
        return replaced or any(writable(*layer) is not None for layer in self.forced)


@dataclass(frozen=True)
class _Merged:
    """A weight's merged values, and what they were made from."""

    values: Tensor
    generation: int


@dataclass
class _Prepared:
    """A stack's plan, factors and merged weights."""

    plan: _Plan | None = None
    strengths: tuple[object, ...] = ()
    factors: dict[tuple[nn.Module, tuple[int, ...]], Factors] = field(default_factory=dict)
    """By module and the uses that change it: a scale of 0 leaves one out."""
    ready: list[_Ready] | None = None
    """The dynamic layers of the plan, with their scales."""
    file_bytes: int = 0
    """What the plan keeps in memory: the parsed files."""
    merged: dict[nn.Parameter, _Merged] = field(default_factory=dict)

    @property
    def merged_size(self) -> int:
        """Bytes of the merged weights."""
        return sum(m.values.numel() * m.values.element_size() for m in self.merged.values())

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        factors = sum(one.size for one in self.factors.values())
        return self.file_bytes + factors + self.merged_size


class Block:
    """What is applied while `LoraEngine.applied` is open; only valid there, and in its thread."""

    mode: Mode
    """How the stack was applied: `Mode.AUTO` resolved."""
    layers: int
    """How many modules are changed, by all adapters together."""
    seconds: float
    """How long the last switch took."""
    warnings: tuple[str, ...]

    def __init__(self, engine: LoraEngine) -> None:
        self._engine = engine
        self._stack: tuple[LoraUse, ...] = ()
        self._now: tuple[bool, ...] = ()
        """Which of the stack's LoRAs are within their range."""
        self._undo = _Undo(engine._originals)

    def switch(self, stack: Stack, mode: Mode | None = None, steps: int | None = None) -> None:
        """Applies another stack in place of this one; layers that both change are written once.

        If it fails, nothing of either stack is applied any more. Raises: as `LoraEngine.applied`.
        """
        begun = time.perf_counter()
        engine, asked = self._engine, mode or self.mode
        if any(use.ranged for use in stack) and asked is Mode.MERGED:
            self._undo.run()
            raise LoraUnsupported(
                "a LoRA for a part of the denoising cannot be merged",
                "Use the mode dynamic or auto, or leave out start and end.",
            )
        self.mode = engine.choose(stack, asked, steps)
        self._go(tuple(stack), tuple(use.holds(0.0) for use in stack))
        self.seconds = time.perf_counter() - begun

    def at(self, fraction: float) -> None:
        """Tells how much of the denoising is done, 0 to 1: LoRAs with a range come and go.

        Does nothing, at no cost, where that changes nothing.
        """
        now = tuple(use.holds(fraction) for use in self._stack)
        if now != self._now:
            self._go(self._stack, now)

    def close(self) -> None:
        """Puts everything back. Raises: RestoreFailed if any of it failed; the rest is put back."""
        self._undo.run()

    def _go(self, stack: tuple[LoraUse, ...], now: tuple[bool, ...]) -> None:
        """Applies the stack, of which those are there that `now` says."""
        self._stack, self._now = (), ()  # what holds if it fails
        drawing = self._engine._drawing
        uses = [
            use if holds else use.without(drawing) for use, holds in zip(stack, now, strict=True)
        ]
        self._apply([use for use in uses if use.scale])
        self._stack, self._now = stack, now

    def _apply(self, stack: Stack) -> None:
        try:
            key, prepared = self._engine._prepare(stack, self.mode)
            plan = prepared.plan
            if plan is None:
                raise RuntimeError("a stack without a plan")
            self._forwards(plan, prepared)
            self._merges(stack, plan, prepared)
        except BaseException:
            self._undo.run()
            raise
        self._engine._prepared.put(key, prepared, prepared.size)
        self.layers = plan.modules
        self.warnings = (
            (f"{len(plan.forced)} layers are quantised or offloaded: applied dynamically",)
            if plan.forced
            else ()
        )

    def _forwards(self, plan: _Plan, prepared: _Prepared) -> None:
        if prepared.ready is None:
            prepared.ready = self._engine._make_ready(plan, prepared)
        self._undo.forwards(keep={entry.module for entry in plan.dynamic})
        for module, forward, factors in prepared.ready:
            forward.set(self._undo.replace_forward(module, forward), factors)

    @torch.no_grad()
    def _merges(self, stack: Stack, plan: _Plan, prepared: _Prepared) -> None:
        originals = self._engine._originals
        self._undo.weights(keep=plan.merges.keys())
        written: dict[nn.Parameter, tuple[_Merge, Tensor]] = {}
        for weight, entry in plan.merges.items():
            content = tuple(
                (stack[part.use].file.identity, part.layer.target, part.scale)
                for part in entry.parts
            )
            if self._undo.content.get(weight) == content:
                continue
            generation = originals.generation(weight)
            ready = prepared.merged.get(weight)
            original = originals.hold(weight)
            self._undo.content[weight] = None  # from here on it is neither the one nor the other
            if ready and ready.generation == generation:
                weight.copy_(ready.values)
            else:
                parts = [(part.layer.part, part.scale) for part in entry.parts]
                view = as_matrix(entry.module, entry.name, weight.detach())
                total = merge(view, as_matrix(entry.module, entry.name, original), parts)
                written[weight] = entry, total
            self._undo.content[weight] = content
        _check_overflow(written)
        self._keep_merged(plan, prepared)

    def _keep_merged(self, plan: _Plan, prepared: _Prepared) -> None:
        """Keeps the merged values for the next time, if the budget has room for the whole stack."""
        engine = self._engine
        size = sum(weight.numel() * weight.element_size() for weight in plan.merges)
        if size + prepared.size - prepared.merged_size > engine._prepared.budget:
            return
        for weight in plan.merges:
            generation = engine._originals.generation(weight)
            kept = prepared.merged.get(weight)
            if kept is None or kept.generation != generation:
                prepared.merged[weight] = _Merged(weight.detach().clone(), generation)


def _low_rank(part: _Part) -> LowRank:
    found = part.layer.part.low_rank()
    if found is None:
        raise TypeError(f"{part.layer.part.name} has no factors")
    return found


def _check_overflow(written: Mapping[nn.Parameter, tuple[_Merge, Tensor]]) -> None:
    """Raises: LoraIncompatible with the first layer whose merged weight does not fit its precision."""
    by_device: dict[torch.device, list[nn.Parameter]] = defaultdict(list)
    for weight, (_, total) in written.items():
        by_device[total.device].append(weight)
    for weights in by_device.values():
        sums = torch.stack([written[weight][1] for weight in weights])  # one wait for the device
        for weight, finite in zip(weights, sums.isfinite().tolist(), strict=True):
            if not finite and not bool(weight.detach().float().isfinite().all()):
                merge_of = written[weight][0]
                raise LoraIncompatible(
                    f"with these LoRAs the {merge_of.name} of {merge_of.target} overflows "
                    f"{str(weight.dtype).removeprefix('torch.')}",
                    "Lower the scale.",
                )


class _Undo:
    """What was changed, and how to put it back. Each change is noted before it is made."""

    def __init__(self, originals: Originals) -> None:
        self.content: dict[nn.Parameter, Hashable] = {}
        """What each weight that was written to holds now."""
        self._originals = originals
        self._forwards: dict[nn.Module, Any] = {}

    def replace_forward(self, module: nn.Module, forward: AdaptedForward) -> Any:
        """Shadows the class's `forward` (or one that an offloading hook put there) on this instance.

        Returns the one that was there before the block.
        """
        if module not in self._forwards:
            self._forwards[module] = module.__dict__.get("forward")
            module.__dict__["forward"] = forward
        previous = self._forwards[module]
        return type(module).forward.__get__(module) if previous is None else previous

    def forwards(self, keep: Any = ()) -> None:
        """Puts back the forwards of all modules but these."""
        for module in [m for m in self._forwards if m not in keep]:
            forward, previous = module.__dict__.pop("forward"), self._forwards.pop(module)
            if previous is not None:
                module.__dict__["forward"] = previous
            forward.clear()

    def weights(self, keep: Any = ()) -> list[Exception]:
        """Puts back all weights but these, each on its own; returns what failed."""
        failed: list[Exception] = []
        for weight in [w for w in self.content if w not in keep]:
            try:
                self._originals.restore(weight)
                del self.content[weight]
            except RuntimeError as error:  # a device that has failed
                failed.append(error)
        return failed

    def run(self) -> None:
        """Puts everything back, each on its own. Raises: RestoreFailed if any of it failed."""
        self.forwards()
        failed = self.weights()
        if not failed:
            self._originals.release()
        else:
            raise RestoreFailed(
                f"{len(failed)} weights could not be restored after a LoRA",
                "The worker asks to be replaced.",
            ) from failed[0]


# --- choosing a mode ------------------------------------------------------------------------------

MERGING_PAYS_AFTER = {"cpu": 4, "cuda": 4}
"""Denoising steps from which on merging is cheaper than the dynamic cost per step."""

SPARE_BYTES = 2 * GB
"""Memory that must stay free for the drawing itself."""


def choose_mode(
    *, ranged: bool, steps: int | None, needed_bytes: int, device: torch.device
) -> Mode:
    """The mode for `auto`: merged where it pays, dynamic where merging is impossible or too dear."""
    if ranged or (steps is not None and steps < MERGING_PAYS_AFTER.get(device.type, 4)):
        return Mode.DYNAMIC
    if needed_bytes and needed_bytes + SPARE_BYTES > free_bytes(device):
        return Mode.DYNAMIC
    return Mode.MERGED


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device: its own, or what the kernel says is available."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo") as stream:  # noqa: PTH123
        for line in stream:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0
