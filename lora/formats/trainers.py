"""One suffix, several trainers' meanings: a module's tensors put into the form that the algorithms have.

Who wrote a file is told by its metadata, its names and its prefixes. Where two readings remain and nothing
tells, the module is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lora.formats.names.prefixes import PEFT_PREFIX
from lora.formats.names.slots import Shape

STEP = ".step"

PLAIN = frozenset({"lora_up", "lora_down", "alpha", "dora_scale", "magnitude"})
"""The slots of most linear layers, which mean the same to all trainers."""

BY_CONFIG = {"hra_u": "HRA", "ada_e": "AdaLoRA", "randlora_lambda": "RandLora"}
"""Slot -> the method, of those whose settings no tensor shows."""

MAGNITUDES = frozenset({"dora_scale", "magnitude"})

COMFY = "diffusion_model."
"""How ComfyUI's training node begins every name."""

ONETRAINER = "ot_"
"""How OneTrainer's fields of the metadata begin."""

OWN = frozenset(
    {
        *("scaled_oft", "clipped_oft", "cans_oft"),
        *("dora_log_multiplier", "dora_multiplier", "initial_norm"),
    }
)
"""The slots that only OneTrainer writes."""


def settle(
    slots: dict[str, Tensor],
    keys: dict[str, str],
    stem: str,
    shape: Shape,
    about: Mapping[str, str],
    *,
    has_config: bool,
) -> str | None:
    """Changes a module's slots in place; returns a reason if they could mean two things.

    `shape`: the weight's, () if it is not known. `about`: the file's metadata. `has_config`: whether PEFT's
    config says more. `keys`: slot -> key; a slot that is renamed is renamed there, too.
    """
    if len(shape) <= 2 and slots.keys() <= PLAIN:
        return None
    for slot, method in BY_CONFIG.items():
        if slot in slots and not has_config:
            return f"{method} can only be read with PEFT's adapter_config.json"
    _multiply_steps(slots)
    if "oft_blocks" in slots and "alpha" in slots and stem.startswith(COMFY):
        slots["constraint"] = slots.pop("alpha")
        keys["constraint"] = keys.pop("alpha")
    down = slots.get("lora_down")
    flat = len(shape) > 2 and down is not None and down.dim() == 2 and "lora_mid" not in slots
    if flat and down is not None and down.shape[1] == math.prod(shape[1:]):
        slots["lora_down"] = down.reshape(-1, *shape[1:])  # ComfyUI's kernels
    if "reshape_weight" in slots and tuple(slots["reshape_weight"].flatten().tolist()) == shape:
        del slots["reshape_weight"]
    if "oft_r" in slots:
        told = "." not in stem or OWN & slots.keys() or any(map(_is_onetrainers, about))
        trainer = ONETRAINER if told else ""
        if not trainer and (has_config or stem.startswith(PEFT_PREFIX)):
            trainer = "peft"
        return _settle_oft(slots, trainer, convolution=len(shape) > 2)
    if "oft_blocks" in slots and MAGNITUDES & slots.keys():
        return "DoRA over LyCORIS' OFT is not read: no trainer writes it"
    return None


def _is_onetrainers(field: str) -> bool:
    return field.startswith(ONETRAINER)


def _multiply_steps(slots: dict[str, Tensor]) -> None:
    """Makes numbers of whole or narrow numbers and the step that a quantiser stored beside them."""
    for step in [slot for slot in slots if slot.endswith(STEP)]:
        name = step.removesuffix(STEP)
        tensor, size = slots.get(name), slots[step].float()
        if tensor is None or tensor.is_complex() or not tensor.dim():
            continue
        if size.numel() == 1:
            slots[name] = tensor.float() * size.reshape(())
        elif size.numel() == tensor.shape[0]:
            slots[name] = tensor.float() * size.reshape(-1, *[1] * (tensor.dim() - 1))
        else:
            continue
        del slots[step]


def _settle_oft(slots: dict[str, Tensor], trainer: str, *, convolution: bool) -> str | None:
    if "magnitude" in slots or ("dora_scale" in slots and trainer != ONETRAINER):
        return "DoRA over OFT is only read as OneTrainer writes it"
    if not convolution:
        return None
    if trainer == ONETRAINER:
        slots["turned_back"] = torch.tensor(True)
    elif not trainer:
        return (
            "OneTrainer and PEFT turn a convolution's inputs in opposite ways, and nothing in the file says "
            "which of them wrote it"
        )
    return None
