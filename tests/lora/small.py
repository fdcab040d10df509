"""A small module tree, and an adapter of every algorithm for it, made by hand."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora.engine.engine import LoraEngine
from lora.engine.stack import Mode, Stack
from lora.formats.adapter import LoraFile, load
from lora.formats.algorithms import Algorithm, LowRank
from lora.formats.contents import Layer
from lora.formats.names.keys import KeyMap
from tests.adapters import randn, write

MODES = (Mode.DYNAMIC, Mode.MERGED)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Small(nn.Module):
    """Linear layers, convolutions and a norm, with a bias and without."""

    INPUTS: ClassVar[Mapping[str, tuple[int, ...]]] = {
        "linear": (2, 3, 12),
        "plain": (2, 8),
        "norm": (2, 6),
        "conv": (2, 4, 5, 5),
        "point": (1, 8, 3, 3),
    }

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 8)
        self.plain = nn.Linear(8, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 6, 1, bias=False)


def small(dtype: torch.dtype = torch.float32) -> Small:
    """The same values every time."""
    root = Small()
    for index, parameter in enumerate(root.parameters()):
        parameter.data = randn(*parameter.shape, seed=100 + index)
    return root.to(dtype).eval()


@torch.no_grad()
def output(root: nn.Module, name: str, shape: tuple[int, ...]) -> Tensor:
    module = root.get_submodule(name)
    dtype = next((p.dtype for p in root.parameters() if p.is_floating_point()), torch.float32)
    return module(randn(*shape, seed=len(name)).to(dtype)).float()


def outputs(root: nn.Module) -> dict[str, Tensor]:
    """What every layer makes of its own input, so that none can hide another's change."""
    return {name: output(root, name, shape) for name, shape in Small.INPUTS.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


SHAPES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "lora": {
        "linear.lora_A.weight": (2, 12),
        "linear.lora_B.weight": (8, 2),
        "plain.lora_A.weight": (3, 8),
        "plain.lora_B.weight": (6, 3),
    },
    "locon": {
        "conv.lora_down.weight": (2, 4, 3, 3),
        "conv.lora_up.weight": (8, 2, 1, 1),
        "point.lora_down.weight": (2, 8, 1, 1),
        "point.lora_up.weight": (6, 2, 1, 1),
    },
    "tucker": {
        "conv.lora_down.weight": (2, 4, 1, 1),
        "conv.lora_mid.weight": (2, 2, 3, 3),
        "conv.lora_up.weight": (8, 2, 1, 1),
    },
    "sparse": {
        "linear.lora_down.weight": (2, 12),
        "linear.lora_up.weight": (8, 2),
        "linear.bias_values": (3,),
    },
    "lora_bias": {
        "linear.lora_A.weight": (2, 12),
        "linear.lora_B.weight": (8, 2),
        "linear.lora_B.bias": (8,),
    },
    "loha": {
        "linear.hada_w1_a": (8, 2),
        "linear.hada_w1_b": (2, 12),
        "linear.hada_w2_a": (8, 2),
        "linear.hada_w2_b": (2, 12),
        "conv.hada_w1_a": (8, 2),
        "conv.hada_w1_b": (2, 36),
        "conv.hada_w2_a": (8, 2),
        "conv.hada_w2_b": (2, 36),
    },
    "lokr": {
        "linear.lokr_w1": (2, 3),
        "linear.lokr_w2": (4, 4),
        "conv.lokr_w1": (2, 2),
        "conv.lokr_w2_a": (4, 2),
        "conv.lokr_w2_b": (2, 18),
    },
    "dora": {
        "linear.lora_A.weight": (2, 12),
        "linear.lora_B.weight": (8, 2),
        "linear.lora_magnitude_vector": (8,),
    },
    "oft": {"linear.oft_blocks": (2, 4, 4), "conv.oft_blocks": (4, 2, 2)},
    "boft": {"linear.oft_blocks": (2, 4, 2, 2)},
    "peft_oft": {"linear.oft_R.weight": (3, 6)},
    "glora": {
        "linear.a1.weight": (12, 2),
        "linear.a2.weight": (2, 12),
        "linear.b1.weight": (8, 2),
        "linear.b2.weight": (2, 12),
    },
    "ia3": {"linear.ia3_l": (8, 1), "plain.weight": (6,)},
    "full": {"linear.diff": (8, 12), "linear.diff_b": (8,), "conv.diff": (8, 4, 3, 3)},
    "set_weight": {"plain.set_weight": (6, 8), "point.set_weight": (6, 8, 1, 1)},
    "norms": {"norm.w_norm": (6,), "norm.b_norm": (6,)},
}
"""Algorithm -> key -> shape."""

WHOLE_NUMBERS: Mapping[str, Mapping[str, Tensor]] = {
    "sparse": {
        "linear.bias_indices": torch.tensor([[0, 1, 7], [11, 0, 3]], dtype=torch.int16),
        "linear.bias_size": torch.tensor([8, 12]),
    },
    "ia3": {"plain.on_input": torch.tensor(0)},
}
NAMES = tuple(SHAPES)


def tensors_of(name: str, seed: int = 0) -> dict[str, Tensor]:
    made = {
        f"unet.{key}": 0.3 * randn(*shape, seed=seed * 1000 + index)
        for index, (key, shape) in enumerate(SHAPES[name].items())
    }
    return made | {f"unet.{key}": value for key, value in WHOLE_NUMBERS.get(name, {}).items()}


def bind(
    tensors: dict[str, Tensor], key_map: KeyMap, *, config: str | None = None, mapped: bool = False
) -> LoraFile:
    """Written and read again, as the worker does it: known by its content's hash."""
    with TemporaryDirectory() as folder:
        path = write(Path(folder) / "same-name.safetensors", tensors)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        file = load(path, key_map, digest, config=config, mapped=mapped)
    if file.unused:
        raise ValueError(file.unused)
    return file


@cache
def _key_map() -> KeyMap:
    return LoraEngine({"unet": small()}).key_map


@cache
def adapter(name: str, seed: int = 0) -> LoraFile:
    """A file of that algorithm; good for every engine on a `Small`."""
    return bind(tensors_of(name, seed), _key_map())


def as_fresh(root: nn.Module, stack: Stack, mode: Mode) -> dict[str, Tensor]:
    """What an engine that has never seen anything makes of a copy."""
    twin = copy.deepcopy(root)
    with LoraEngine({"unet": twin}).applied(stack, mode):
        return outputs(twin)


class Poisoned(Exception):
    """What a `Poison` raises."""


@dataclass(frozen=True, eq=False)
class Poison(Algorithm):
    """A part that cannot be applied; the ones before it can."""

    name: ClassVar[str] = "poison"
    low: bool

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return None

    @property
    def is_low_rank(self) -> bool:
        return self.low

    def low_rank(self) -> LowRank | None:
        if self.low:
            raise Poisoned
        return None

    def delta(self, weight: Tensor) -> Tensor:
        raise Poisoned


def poisoned(file: LoraFile, *, low: bool) -> LoraFile:
    """The file, and behind its layers one that fails: in its factors, or when it is merged."""
    target = _key_map().find("unet.point")
    if target is None:
        raise ValueError("no such layer")
    layers = (*file.layers, Layer(target, "weight", Poison(low), 1))
    return replace(file, layers=layers, identity=f"{file.identity} poisoned {low}")
