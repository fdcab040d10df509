"""What can be chosen of an extraction, checked when it is built."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from enum import StrEnum

import torch

from lora.errors import ToolError
from lora.formats.names.naming import Naming
from lora.tools.adapters.saving import Format
from lora.tools.factors.ranks import RankPolicy

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Conv(StrEnum):
    """How a convolution's change becomes factors."""

    FLAT = "flat"
    """LoCon: down [r, in, kh, kw], up [out, r, 1, 1]. The best approximation of its rank."""
    TUCKER = "tucker"
    """With a core, `lora_mid` [r, r, kh, kw]: smaller, and less exact at the same rank."""


@dataclass(frozen=True)
class ExtractOptions:
    """Raises: ToolError for a dtype that adapters are not stored in, or a number out of its range."""

    policy: RankPolicy = field(default_factory=lambda: RankPolicy(rank=32))
    dtype: torch.dtype = torch.float16
    """Of the factors. A difference that is not exact in it is stored in float32."""
    naming: Naming | None = None
    """None: kohya's for Stable Diffusion, the model's own (`original`) for others."""
    format: Format = Format.SAFETENSORS
    diff_only: bool = False
    """No factors: every change as a difference, so that source + difference rounds to the target."""
    conv: Conv = Conv.FLAT
    components: frozenset[str] | None = None
    """Which are looked at; None for all that an adapter can change."""
    min_diff: float = 0.0
    """A tensor none of whose numbers changed by more is left out."""
    clamp_quantile: float | None = None
    """sd-scripts' habit, off: factors are cut off at this quantile of their absolute values."""
    small: int = 1024
    """Tensors of up to this many numbers are stored exactly, as differences."""
    seed: int = 0
    verify: bool = False
    """Read the result again, merge it into the source, and measure how far that is from the target."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            name = str(self.dtype).removeprefix("torch.")
            raise ToolError(f"an adapter cannot be stored as {name}", "Take fp32, fp16 or bf16.")
        if not 0 <= self.min_diff < float("inf"):
            raise ToolError(f"min_diff is {self.min_diff}", "It is 0 or more.")
        if self.clamp_quantile is not None and not 0 < self.clamp_quantile <= 1:
            raise ToolError(f"clamp_quantile is {self.clamp_quantile}", "It is over 0, at most 1.")
        if self.components is not None and not self.components:
            raise ToolError("no component is chosen")
        if self.diff_only and self.policy.max_bytes is not None:
            raise ToolError(
                "exact differences have the size that they have", "Leave out max_bytes."
            )
        if self.diff_only and not self.holds_differences:
            raise ToolError(
                f"the naming {self.naming} has no names for differences", "Take kohya or original."
            )

    @property
    def holds_differences(self) -> bool:
        """Whether the naming can say what is no pair of factors."""
        return self.naming is None or not self.naming.has_config

    def identity(self, *sources: str) -> str:
        """A hash of everything that the result's bytes depend on; `sources` are the models' hashes."""
        own = [
            f"{one.name}={_text(getattr(self, one.name))}"
            for one in fields(self)
            if one.name not in ("verify", "format")
        ]
        return hashlib.sha256("\n".join([*own, *sources]).encode()).hexdigest()


def _text(value: object) -> str:
    return str(sorted(value)) if isinstance(value, frozenset) else str(value)
