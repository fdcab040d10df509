"""The numbers that PEFT and diffusers keep beside the tensors: alphas, and how they scale.

PEFT writes them to `adapter_config.json`; diffusers puts one such config per component into the file's
metadata, as JSON under `lora_adapter_metadata` with names such as `unet.lora_alpha`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora.errors import LoraCorrupt

RANKED = ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""The slots whose first dimension is the rank."""


NEUMANN_TERMS, MAX_NEUMANN_TERMS, OFT_EPS = 5, 100, 6e-5
"""PEFT's defaults for OFT, and more terms than anyone needs."""


@dataclass(frozen=True)
class Alphas:
    """One PEFT config per component; the empty name stands for all of them."""

    configs: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, metadata: Mapping[str, str], config: str | None = None) -> Alphas:
        """From a file's metadata and, if there is one, the text of its `adapter_config.json`.

        Raises: LoraCorrupt if either is there and is not what peft writes.
        """
        try:
            configs = _by_component(json.loads(metadata.get("lora_adapter_metadata", "{}")))
            if config is not None:
                configs[""] = json.loads(config)
            for one in configs.values():
                _check(one)
        except (
            ValueError,
            TypeError,
            AttributeError,
            RecursionError,
            re.error,
            OverflowError,
        ) as error:
            what = "adapter_config.json" if config is not None else "lora_adapter_metadata"
            raise LoraCorrupt(f"the file's {what} is malformed") from error
        return cls(configs)

    def complete(self, slots: dict[str, Tensor], component: str, name: str) -> None:
        """Adds to a layer's tensors what the config says of it; `name` is the layer's in the file."""
        config = self.configs.get(component, self.configs.get(""))
        if config is None:
            return
        name = name.removeprefix("base_model.model.")  # PEFT's patterns do not see it
        if "oft_r" in slots and slots["oft_r"].dim() == 2:
            _complete_oft(slots, config)
        elif "ia3_l" in slots and config.get("feedforward_modules") is not None:
            slots["on_input"] = torch.tensor(_is_named(config["feedforward_modules"], name))
        elif "alpha" not in slots:
            _complete_alpha(slots, config, name)


def _complete_alpha(slots: dict[str, Tensor], config: Mapping[str, Any], name: str) -> None:
    alpha = _of(config, "alpha_pattern", ("lora_alpha", "alpha"), name)
    if alpha is None:
        return
    rank = next((slots[s].shape[0] for s in RANKED if s in slots and slots[s].dim()), None)
    if rank is not None:
        # rsLoRA (arXiv 2312.03732): scaling = alpha / sqrt(rank).
        rs_lora = bool(config.get("use_rslora"))
        slots["alpha"] = torch.tensor(alpha * (math.sqrt(rank) if rs_lora else 1.0))
    elif "lokr_w1" in slots and "lokr_w2" in slots:
        # PEFT scales a LoKr by alpha / r even where both factors are whole; LyCORIS does not.
        whole = _of(config, "rank_pattern", ("r",), name) or alpha
        slots["lokr_w1"] = slots["lokr_w1"].float() * (alpha / whole)


def _complete_oft(slots: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    exact = config.get("use_cayley_neumann") is False
    terms = config.get("num_cayley_neumann_terms") or NEUMANN_TERMS
    slots["neumann_terms"] = torch.tensor(0 if exact else int(terms))
    if config.get("coft"):
        # `OFTRotationModule._project_batch`: the forward holds each block's norm to eps / sqrt(blocks).
        vectors = slots["oft_r"].float()
        limit = float(config.get("eps") or OFT_EPS) / math.sqrt(vectors.shape[0])
        norms = vectors.norm(dim=1, keepdim=True) * math.sqrt(2)  # of the whole skew matrix
        slots["oft_r"] = torch.where(norms <= limit, vectors, vectors * (limit / norms))


def _is_named(wanted: str | list[str], layer: str) -> bool:
    """PEFT's rule for lists of modules: a pattern for the whole name, or endings of it."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, layer) is not None
    return any(layer == one or layer.endswith(f".{one}") for one in wanted)


def _by_component(fields: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        component, _, option = name.partition(".")
        found.setdefault(component, {})[option] = value
    return dict(found)


def _check(config: Mapping[str, Any]) -> None:
    """Raises: TypeError, ValueError or AttributeError where a number or a table is none."""
    for name in ("lora_alpha", "alpha", "r", "eps", "num_cayley_neumann_terms"):
        if config.get(name) is not None and not math.isfinite(float(config[name])):
            raise ValueError(name)
    if not 0 <= int(config.get("num_cayley_neumann_terms") or 0) <= MAX_NEUMANN_TERMS:
        raise ValueError("num_cayley_neumann_terms")
    _is_named(config.get("feedforward_modules") or [], "")
    for name in ("alpha_pattern", "rank_pattern"):
        for pattern, value in (config.get(name) or {}).items():
            re.compile(pattern)
            float(value)


def _of(
    config: Mapping[str, Any], patterns: str, names: tuple[str, ...], layer: str
) -> float | None:
    """A layer's number: by the first pattern that its name ends in (PEFT's own rule), else the default."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return float(value)
    found = next((config[name] for name in names if config.get(name) is not None), None)
    return None if found is None else float(found)
