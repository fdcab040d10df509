"""Applies adapters to a pipeline's modules for the time of a block, and puts every bit back.

Two ways, with one meaning, W' = W + sum over the stack of scale * delta:

- dynamic: the weight is not touched. The layer's `forward` adds `up @ (down @ x)` to its output; the
  factors of the whole stack are concatenated along the rank, so several LoRAs cost one pair of products.
  A part without low-rank factors is merged instead, its layer alone.
- merged: W' is computed in float32, rounded once and written into the weight's own storage. The original
  was copied aside before and is copied back afterwards; nothing is ever subtracted.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora.algorithms import LowRank
from lora.errors import CodedError
from lora.files import Layer, LoraFile
from lora.keys import KeyMap, Shape


class Mode(StrEnum):
    """How to apply: see the module's text."""

    DYNAMIC = "dynamic"
    MERGED = "merged"


@dataclass(frozen=True)
class LoraUse:
    """One adapter of a stack, and how strongly: 1 is as trained, 0 nothing, negative the reverse."""

    file: LoraFile
    scale: float = 1.0


@dataclass(frozen=True)
class Applied:
    """What a block got."""

    layers: int
    """How many modules were changed, by all adapters together."""
    seconds: float


@dataclass(frozen=True)
class _LayerPlan:
    """All that a stack does to one module."""

    module: nn.Linear | nn.Conv2d
    parts: tuple[tuple[Layer, float], ...]

    def factors(self) -> list[tuple[LowRank, float]] | None:
        """All of it as factors that two plain products add to the module's output; None if it is not so."""
        conv = self.module
        if isinstance(conv, nn.Conv2d) and (conv.groups > 1 or conv.padding_mode != "zeros"):
            return None
        found = [(layer.part.low_rank(), scale) for layer, scale in self.parts]
        low_rank = [(factor, scale) for factor, scale in found if factor is not None]
        return low_rank if len(low_rank) == len(found) else None


class RestoreFailed(CodedError):
    """A weight could not be put back: the pipeline must not draw again. The process should end."""

    code = "INTERNAL"


class EngineBusy(RuntimeError):
    """`applied` was entered while another block is open: a mistake of the program, not of a user."""


class LoraEngine:
    """Knows the modules of one pipeline and applies stacks of adapters to them, one stack at a time."""

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        """`components`: name (`unet`, `text_encoder`, ...) -> root module. Nothing is changed."""
        self._modules = {
            (component, path): module
            for component, root in components.items()
            for path, module in root.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))
        }
        self._busy = threading.Lock()

    def key_map(self) -> KeyMap:
        """The names under which adapters may address the modules."""
        targets: dict[str, dict[str, Shape]] = defaultdict(dict)
        for (component, path), module in self._modules.items():
            targets[component][path] = tuple(module.weight.shape)
        return KeyMap(targets)

    @contextmanager
    def applied(self, stack: Sequence[LoraUse], mode: Mode = Mode.DYNAMIC) -> Iterator[Applied]:
        """Applies the stack, in its order, while the block runs.

        After the block, left by whatever way, and after a failure to apply, every parameter is bit for
        bit what it was and every module has its own `forward` again. Raises: EngineBusy if a block is
        open already, in this thread or another.
        """
        if not self._busy.acquire(blocking=False):
            raise EngineBusy("a stack of LoRAs is applied already; one block at a time")
        undo = _Undo()
        try:
            begun = time.perf_counter()
            plans = self._plan(stack)
            _apply(plans, mode, undo)
            yield Applied(len(plans), time.perf_counter() - begun)
        finally:
            try:
                undo.run()
            finally:
                self._busy.release()

    def _plan(self, stack: Sequence[LoraUse]) -> list[_LayerPlan]:
        parts: dict[tuple[str, str], list[tuple[Layer, float]]] = defaultdict(list)
        for use in stack:
            for layer in use.file.layers:
                if use.scale != 0.0:
                    parts[layer.target.component, layer.target.path].append((layer, use.scale))
        return [_LayerPlan(self._modules[where], tuple(found)) for where, found in parts.items()]


class _Undo:
    """What was changed, and how to put it back. Each change is noted before it is made."""

    def __init__(self) -> None:
        self._originals: dict[Tensor, Tensor] = {}
        self._forwards: list[tuple[nn.Module, Any]] = []

    def keep_weight(self, weight: Tensor) -> Tensor:
        """The weight's original, copied aside when it is first asked for."""
        if weight not in self._originals:
            self._originals[weight] = weight.detach().clone()
        return self._originals[weight]

    def replace_forward(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        """Shadows the class's `forward` (or one that an offloading hook put there) on this instance."""
        self._forwards.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    @torch.no_grad()
    def run(self) -> None:
        """Puts everything back, each on its own. Raises: RestoreFailed if any of it failed."""
        for module, previous in self._forwards:
            if previous is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = previous
        failed: list[Exception] = []
        for weight, original in self._originals.items():
            try:
                weight.copy_(original)
            except RuntimeError as error:  # a device that has failed
                failed.append(error)
        if failed:
            raise RestoreFailed(
                f"{len(failed)} weights could not be restored after a LoRA",
                "The worker asks to be replaced.",
            ) from failed[0]


@torch.no_grad()
def _apply(plans: Sequence[_LayerPlan], mode: Mode, undo: _Undo) -> None:
    to_merge: dict[Tensor, list[tuple[Layer, float]]] = defaultdict(list)
    for plan in plans:
        factors = plan.factors() if mode is Mode.DYNAMIC else None
        if factors is None:
            # By weight, not by module: tied modules share one, and it must be rounded once.
            to_merge[plan.module.weight] += plan.parts
        else:
            undo.replace_forward(plan.module, dynamic_forward(plan.module, factors))
    for weight, parts in to_merge.items():
        weight.copy_(merged_weight(undo.keep_weight(weight), parts))


def merged_weight(weight: Tensor, parts: Sequence[tuple[Layer, float]]) -> Tensor:
    """W + sum of scale * delta, in float32; the caller's copy into W is the one rounding."""
    total = weight.float()
    if total is weight:  # float32 already: `float()` made no copy
        total = weight.clone()
    for layer, scale in parts:
        total.add_(layer.part.delta(weight), alpha=scale)
    return total


def dynamic_forward(
    module: nn.Linear | nn.Conv2d, factors: Sequence[tuple[LowRank, float]]
) -> Callable[[Tensor], Tensor]:
    """A `forward` for the module that adds scaled factors to its output, in the module's own dtype.

    The factors are concatenated: down [R, in(, kh, kw)], up [R, out], R the sum of the ranks; the
    scales multiply the R values in between.
    """
    weight = module.weight
    down = torch.cat([f.down.flatten(1).to(weight) for f, _ in factors])
    up = torch.cat([f.up.to(weight) for f, _ in factors], dim=1).t()
    scales = torch.cat(
        [torch.full((f.down.shape[0],), s * f.scaling, device=weight.device) for f, s in factors]
    ).to(weight.dtype)
    original = module.forward
    if isinstance(module, nn.Linear):

        def linear_forward(x: Tensor) -> Tensor:
            out: Tensor = original(x)
            inner = functional.linear(x, down).mul_(scales)
            out.view(-1, out.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), up)
            return out

        return linear_forward

    kernel, lift = down.view(-1, *weight.shape[1:]), up.t()[:, :, None, None]
    conv = module

    def conv_forward(x: Tensor) -> Tensor:
        inner = functional.conv2d(x, kernel, None, conv.stride, conv.padding, conv.dilation)
        out: Tensor = original(x)
        return out.add_(functional.conv2d(inner.mul_(scales[:, None, None]), lift))

    return conv_forward
