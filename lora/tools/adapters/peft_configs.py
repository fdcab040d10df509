"""Makes PEFT's configs, which hold the ranks and alphas of an adapter's modules and how its layers are built.

Keys and defaults are those of peft 0.21 (`LoraConfig.to_dict` and its like). A name in a config fits every
module whose path ends in it, so a name that is the end of another one must come after it, or be excluded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora.errors import ToolError
from lora.formats.algorithms.lokr import LoKr
from lora.formats.names.naming import peft_types

PEFT_VERSION = "0.21.0"
"""The version whose forms these are; peft refuses some of versions before 0.18."""

USE_OTHER_NAMING = "Write it as --naming kohya or original, or convert it to --algorithm lora."


@dataclass(frozen=True, eq=False)
class ConfigPart:
    """One module for a config."""

    path: str
    """PEFT's name, which has no prefix before the model's own names."""
    slots: Mapping[str, Tensor]
    rank: int | None
    alpha: float | None


def config_of(parts: Sequence[ConfigPart]) -> dict[str, Any]:
    """The config of the adapter of one network.

    Raises: ToolError if one PEFT adapter cannot hold these modules: different algorithms, or DoRA for some
    only.
    """
    types = {kind for part in parts for kind in peft_types(part.slots)}
    if not types:
        raise ToolError(
            "the adapter is of a PEFT method whose config the tools do not write",
            "Convert it to --algorithm lora.",
        )
    if len(types) != 1:
        raise ToolError(
            f"one PEFT adapter cannot be {' and '.join(sorted(types))}",
            USE_OTHER_NAMING,
        )
    kind = types.pop()
    config: dict[str, Any] = {
        "peft_type": kind,
        "peft_version": PEFT_VERSION,
        "target_modules": _targets([part.path for part in parts]),
        "inference_mode": True,
        "base_model_name_or_path": None,
        "task_type": None,
    }
    if kind == "OFT":
        return config | _oft(parts)
    if kind == "IA3":
        return config | _ia3(parts)
    numbers = {part.path: _numbers(part) for part in parts}
    alpha = "lora_alpha" if kind == "LORA" else "alpha"
    config |= _tables("r", "rank_pattern", {path: rank for path, (rank, _) in numbers.items()})
    config |= _tables(
        alpha, "alpha_pattern", {path: number for path, (_, number) in numbers.items()}
    )
    if kind == "LORA":
        config |= _lora(parts)
    elif any("hada_t1" in part.slots for part in parts):
        config["use_effective_conv2d"] = True
    return config


def _numbers(part: ConfigPart) -> tuple[int, float]:
    """Rank and alpha. PEFT scales a LoKr of two whole factors by alpha / rank too, so both are set equal, and
    large enough to keep them whole."""
    if part.rank is not None and part.alpha is not None:
        return part.rank, part.alpha
    whole = LoKr(**{slot: part.slots[slot] for slot in ("lokr_w1", "lokr_w2")})
    sides = [n for t in (whole.lokr_w1, whole.lokr_w2) if t is not None for n in t.flatten(1).shape]
    return max(sides), float(max(sides))


def _tables(default: str, patterns: str, numbers: Mapping[str, float]) -> dict[str, Any]:
    """The most frequent number, and a table of the modules that have another number, or that would get one
    from the entry of a shorter name. Longer names come first, because the first that fits counts.
    """
    usual = Counter(numbers.values()).most_common(1)[0][0]
    table = {path: number for path, number in numbers.items() if number != usual}
    caught = {path: usual for path in numbers if path not in table and _ends_in(path, table)}
    rows = sorted((table | caught).items(), key=lambda row: (-row[0].count("."), row[0]))
    return {default: usual, patterns: dict(rows)}


def _ends_in(path: str, names: Iterable[str]) -> bool:
    """Whether the path without its first words is one of the names."""
    wanted, rest = set(names), path.partition(".")[2]
    while rest:
        if rest in wanted:
            return True
        rest = rest.partition(".")[2]
    return False


def _targets(paths: Sequence[str]) -> list[str] | str:
    """PEFT's `target_modules`: the paths, or one pattern for all if a path has no dot.

    A path without a dot could also be the end of another module's path, even of one without an adapter.
    """
    if all("." in path for path in paths):
        return sorted(paths)
    return f"^({'|'.join(re.escape(path) for path in sorted(paths))})$"


def _lora(parts: Sequence[ConfigPart]) -> dict[str, Any]:
    dora = ["magnitude" in part.slots for part in parts]
    bias = any("lora_up_bias" in part.slots for part in parts)
    if any(dora) and not all(dora):
        raise ToolError(
            "a PEFT adapter has DoRA for all layers or for none, and this one for some",
            USE_OTHER_NAMING,
        )
    if any(dora) and bias:
        raise ToolError(
            "a PEFT adapter has DoRA or a bias in lora_B, and this one both", USE_OTHER_NAMING
        )
    return {
        "use_dora": any(dora),
        "lora_bias": bias,
        "use_rslora": False,  # its root is in the alphas
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }


def _oft(parts: Sequence[ConfigPart]) -> dict[str, Any]:
    terms = {int(part.slots.get("neumann_terms", 5)) for part in parts}
    sizes = {_block_size(part.slots["oft_r"]) for part in parts}
    if len(terms) > 1 or len(sizes) > 1:
        raise ToolError("the layers' OFT differs in its blocks or its transform", USE_OTHER_NAMING)
    number = terms.pop()
    return {
        "r": 0,
        "oft_block_size": sizes.pop(),
        "block_share": all(part.slots["oft_r"].shape[0] == 1 for part in parts),
        "use_cayley_neumann": number > 0,
        "num_cayley_neumann_terms": number or 5,
        "coft": False,  # the rotations are constrained already
        "bias": "none",
        "fan_in_fan_out": False,
    }


def _block_size(vectors: Tensor) -> int:
    """The b for which the vectors have b (b - 1) / 2 numbers."""
    return int((1 + (1 + 8 * vectors.shape[-1]) ** 0.5) / 2)


def _ia3(parts: Sequence[ConfigPart]) -> dict[str, Any]:
    return {
        "feedforward_modules": sorted(part.path for part in parts if _on_input(part.slots)),
        "fan_in_fan_out": False,
    }


def _on_input(slots: Mapping[str, Tensor]) -> bool:
    if "on_input" in slots:
        return bool(slots["on_input"])
    factors = slots["ia3_l"]
    return factors.dim() == 2 and factors.shape[0] == 1 and factors.shape[1] != 1
