"""An adapter file <-> LoraFile: every tensor either belongs to a layer, or is listed with its reason."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from lora.algorithms import ALGORITHMS, Algorithm
from lora.algorithms.base import takes
from lora.errors import LoraCorrupt, LoraIncompatible, LoraUnsupported
from lora.families import cross_attention_width, identify
from lora.header import Header, read_header
from lora.keys import KeyMap, Target

UNKNOWN_MODULE = "no module of this model has that name"


@dataclass(frozen=True)
class Layer:
    """One module's part of a file."""

    target: Target
    part: Algorithm
    keys: int
    """How many tensors of the file it is made of."""


@dataclass(frozen=True)
class UnusedKey:
    """A tensor of the file that does nothing here, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class LoraFile:
    """A parsed adapter, bound to the modules of one pipeline, its tensors still on the CPU.

    The tensors of its layers and its unused keys together are the whole file.
    """

    sha256: str
    layers: tuple[Layer, ...]
    unused: tuple[UnusedKey, ...]
    metadata: Mapping[str, str]

    @cached_property
    def algorithms(self) -> tuple[str, ...]:
        """The algorithms that occur, the most frequent first."""
        return tuple(n for n, _ in Counter(layer.part.name for layer in self.layers).most_common())

    @cached_property
    def rank(self) -> int:
        """The most frequent rank of its layers."""
        return Counter(layer.part.rank for layer in self.layers).most_common(1)[0][0]

    @property
    def keys(self) -> int:
        """How many tensors its layers are made of."""
        return sum(layer.keys for layer in self.layers)


def load(path: Path, key_map: KeyMap, sha256: str) -> LoraFile:
    """Reads a .safetensors adapter and binds it to the pipeline that `key_map` describes.

    Touches no weight. Raises: LoraCorrupt if the file is not whole; LoraIncompatible if none of its
    tensors has a place in this pipeline, or its cross attention is another model's; LoraUnsupported if
    they have, and none can be applied.
    """
    header = read_header(path)
    try:
        # Not by memory map: on a shared volume another worker may remove the file under it.
        tensors = load_tensors(path.read_bytes())
    except (SafetensorError, OSError) as error:
        raise LoraCorrupt("the file's tensors cannot be read") from error
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise LoraCorrupt(f"the tensor {key} holds NaN or infinity")
    layers, unused = _bind(tensors, key_map, Alphas.of(header.metadata))
    _refuse_other_models(header, layers, unused, key_map)
    return LoraFile(sha256, tuple(layers), tuple(unused), header.metadata)


@dataclass(frozen=True)
class Alphas:
    """The alphas that diffusers keeps in a file's metadata instead of in tensors.

    `lora_adapter_metadata` is JSON with, by component, `lora_alpha`, `use_rslora` and, by module,
    `alpha_pattern`, as peft's LoraConfig names them.
    """

    fields: Mapping[str, Any]

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> Alphas:
        """Raises: LoraCorrupt if the entry is there and is not what peft writes."""
        try:
            fields = json.loads(metadata.get("lora_adapter_metadata", "{}"))
            for name, value in fields.items():
                if name.endswith(".lora_alpha"):
                    float(value)
                elif name.endswith(".alpha_pattern"):
                    [float(alpha) for alpha in (value or {}).values()]
        except (ValueError, TypeError, AttributeError) as error:
            raise LoraCorrupt("the file's lora_adapter_metadata is malformed") from error
        return cls(fields)

    def find(self, target: Target, rank: int) -> Tensor | None:
        """The module's alpha such that alpha / rank is its scaling; None if the metadata has none."""
        pattern = self.fields.get(f"{target.component}.alpha_pattern") or {}
        alpha = pattern.get(target.path, self.fields.get(f"{target.component}.lora_alpha"))
        if alpha is None:
            return None
        # rsLoRA (arXiv 2312.03732): scaling = alpha / sqrt(rank).
        rs_lora = bool(self.fields.get(f"{target.component}.use_rslora"))
        return torch.tensor(float(alpha) * (math.sqrt(rank) if rs_lora else 1.0))


def _bind(
    tensors: Mapping[str, Tensor], key_map: KeyMap, alphas: Alphas
) -> tuple[list[Layer], list[UnusedKey]]:
    grouped: dict[Target, dict[str, str]] = defaultdict(dict)
    unused: list[UnusedKey] = []
    for key in tensors:
        match = key_map.match(key)
        if match is None:
            unused.append(UnusedKey(key, UNKNOWN_MODULE))
        elif match.slot in grouped[match.target]:
            twin = grouped[match.target][match.slot]
            unused.append(UnusedKey(key, f"says the same as {twin}"))
        else:
            grouped[match.target][match.slot] = key
    layers: list[Layer] = []
    for target, keys in grouped.items():
        slots = {slot: tensors[key] for slot, key in keys.items()}
        down = slots.get("lora_down")
        if "alpha" not in slots and down is not None and down.dim():
            alpha = alphas.find(target, down.shape[0])
            slots |= {} if alpha is None else {"alpha": alpha}
        part, reason = _part(target, slots)
        if part is None:
            unused += [UnusedKey(key, reason) for key in keys.values()]
        else:
            layers.append(Layer(target, part, len(keys)))
    return layers, unused


def _part(target: Target, slots: dict[str, Tensor]) -> tuple[Algorithm | None, str]:
    """The algorithm that these tensors of one module are, or the reason why they are none."""
    alpha = slots.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        return None, "alpha is not one number"
    if any(0 in tensor.shape for tensor in slots.values()):
        return None, "a tensor is empty"
    for algorithm in ALGORITHMS:
        if takes(algorithm, slots):
            part = algorithm(**slots)
            misfit = part.misfit(target.shape)
            return (None, misfit) if misfit else (part, "")
    return None, f"no known algorithm has exactly the tensors {', '.join(sorted(slots))}"


def _refuse_other_models(
    header: Header, layers: list[Layer], unused: list[UnusedKey], key_map: KeyMap
) -> None:
    """Some layers of another family's file may fit by chance, so its cross attention must fit too."""
    width, ours = cross_attention_width(header), _cross_attention_of(key_map)
    family = identify(header)
    what = f"the file was made for {family}" if family else "the file is for an unknown model"
    if width and ours and width != ours:
        raise LoraIncompatible(
            f"{what} (its cross attention reads {width} values per token, this model's {ours})",
            "Choose a LoRA for the model that this worker runs.",
        )
    if layers:
        return
    known = [u for u in unused if u.reason != UNKNOWN_MODULE]
    if known:
        raise LoraUnsupported(
            f"none of the file's {len(unused)} tensors can be applied "
            f"({known[0].key}: {known[0].reason})",
            "The README lists the algorithms that are read.",
        )
    raise LoraIncompatible(
        f"{what}, and none of its {len(unused)} tensors fits this model "
        f"({unused[0].key}: {unused[0].reason})",
        "Choose a LoRA for the model that this worker runs.",
    )


def _cross_attention_of(key_map: KeyMap) -> int | None:
    widths = {t.shape[1] for t in key_map.targets if t.path.endswith(".attn2.to_k")}
    return widths.pop() if len(widths) == 1 else None
