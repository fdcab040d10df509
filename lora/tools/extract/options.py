"""The options of an extraction, and the form that they give to a parameter's change."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, fields
from enum import StrEnum

import torch

from lora.errors import ToolError
from lora.formats.names.keys import MODULATIONS
from lora.formats.names.naming import Naming
from lora.formats.names.slots import Shape
from lora.tools import TABLES, Format, dtype_name
from lora.tools.factors.ranks import RankPolicy

OUTPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

SMALL = 1024
"""Tensors of up to this many numbers are stored exactly, as differences."""


class Conv(StrEnum):
    """How the change of a convolution becomes factors."""

    FLAT = "flat"
    """LoCon: down [r, in, kh, kw], up [out, r, 1, 1]. The best approximation of its rank."""
    TUCKER = "tucker"
    """With a core, `lora_mid` [r, r, kh, kw]: smaller, and less exact at the same rank."""


@dataclass(frozen=True)
class ExtractOptions:
    """Raises: ToolError for a dtype that adapters are not stored in, or a number out of its range."""

    policy: RankPolicy = field(default_factory=lambda: RankPolicy(rank=32))
    dtype: torch.dtype = torch.bfloat16
    """Of the factors. A difference that is not exact in it is stored in float32."""
    naming: Naming | None = None
    """None: kohya's for Stable Diffusion, the model's own (`original`) for other models."""
    format: Format = Format.SAFETENSORS
    diff_only: bool = False
    """Store every change as a difference and none as factors, so that source + difference rounds to the
    target."""
    conv: Conv = Conv.FLAT
    components: frozenset[str] | None = None
    """The components that are compared; None for all that an adapter can change."""
    min_diff: float = 0.0
    """A tensor is left out if none of its numbers changed by more."""
    clamp_quantile: float | None = None
    """Clamp the factors at this quantile of their absolute values, as sd-scripts does."""
    seed: int = 0
    verify: bool = False
    """Read the result, merge it into the source, and measure the distance to the target."""
    overwrite: bool = False
    """Whether what is at the output is replaced, once the new adapter is whole: see `refuse_overwriting`."""

    def __post_init__(self) -> None:
        if self.dtype not in OUTPUT_DTYPES:
            hint = "Take fp32, fp16 or bf16."
            raise ToolError(f"an adapter cannot be stored as {dtype_name(self.dtype)}", hint)
        if not 0 <= self.min_diff < float("inf"):
            raise ToolError(f"min_diff is {self.min_diff}", "It is 0 or more.")
        if self.clamp_quantile is not None and not 0 < self.clamp_quantile <= 1:
            raise ToolError(
                f"clamp_quantile is {self.clamp_quantile}", "It must be over 0 and at most 1."
            )
        if self.components is not None and not self.components:
            raise ToolError("no component is chosen")
        if self.diff_only and self.policy.max_bytes is not None:
            hint = "Leave out max_bytes."
            raise ToolError("max_bytes does not apply to exact differences", hint)
        if self.diff_only and not self.holds_differences:
            hint = "Take kohya or original."
            raise ToolError(f"the naming {self.naming} has no names for differences", hint)

    @property
    def holds_differences(self) -> bool:
        """Whether the naming has keys for differences."""
        return self.naming is None or not self.naming.has_config

    def identity(self, *sources: str) -> str:
        """A hash of everything that the result's bytes depend on; `sources` are the models' hashes."""
        lines = []
        for name in (option.name for option in fields(self)):
            value = getattr(self, name)
            if name not in ("verify", "format", "overwrite"):
                lines.append(f"{name}={sorted(value) if isinstance(value, frozenset) else value}")
        return hashlib.sha256("\n".join([*lines, *sources]).encode()).hexdigest()


def slot_of_difference(parameter: str) -> str | None:
    """The slot for a parameter's difference; None if no adapter changes a parameter of that name."""
    if parameter in MODULATIONS:
        return "diff_m"
    return {"weight": "diff", "bias": "diff_b"}.get(parameter)


def takes_factors(name: str, shape: Shape, options: ExtractOptions) -> bool:
    """Whether a change becomes factors: that of the weight of a linear layer or convolution, unless factors
    would not be smaller. A naming without differences takes them always. Never for a table of rows.
    """
    module, _, parameter = name.rpartition(".")
    if options.diff_only or parameter != "weight" or len(shape) < 2:
        return False
    if module.rpartition(".")[2] in TABLES:
        return False
    if not options.holds_differences:
        return True
    if math.prod(shape) <= SMALL:
        return False
    return numbers_of(shape, options.policy.known or 1, options) < math.prod(shape)


def slots_of_factors(shape: Shape, options: ExtractOptions) -> tuple[str, ...]:
    """The slots that `extract_layer` fills for a parameter that takes factors."""
    mid = ("lora_mid",) if is_tucker(shape, options) else ()
    return ("lora_up", "lora_down", *mid, "alpha")


def bytes_per_rank(shape: Shape, options: ExtractOptions) -> int:
    """The bytes in the file for one more rank of a layer; a Tucker layer counts as a flat one."""
    return (shape[0] + math.prod(shape[1:])) * options.dtype.itemsize


def is_tucker(shape: Shape, options: ExtractOptions) -> bool:
    """Whether a layer gets a core between its factors."""
    return options.conv is Conv.TUCKER and len(shape) == 4 and math.prod(shape[2:]) > 1


def numbers_of(shape: Shape, rank: int, options: ExtractOptions) -> int:
    """How many numbers a layer's factors have."""
    if is_tucker(shape, options):
        rank = min(rank, *shape[:2])
        return rank * (shape[0] + shape[1] + rank * math.prod(shape[2:]))
    return rank * (shape[0] + math.prod(shape[1:]))
