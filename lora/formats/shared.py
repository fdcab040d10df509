"""Tensors that all modules of a file share: the random bases of PEFT's RandLora.

PEFT saves them for the whole, as `base_model.randlora_A`, and again for each module, if `save_projection` is
on. Without it the file lacks them: PEFT makes them anew from a seed, in a type that depends on the machine,
so that nothing but the machine of the training tells what they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from lora.errors import LoraUnsupported
from lora.formats.names.prefixes import unwrapped

BASES: Mapping[str, str] = {
    "base_model.randlora_A": "randlora_a",
    "base_model.randlora_B": "randlora_b",
}
"""Key -> slot."""

_ENDINGS = ("randlora_A", "randlora_B")


class Sharing(Protocol):
    """A module's part of the file: see `contents.Module`."""

    keys: dict[str, str]
    slots: dict[str, Tensor]


def is_shared(key: str) -> bool:
    """Whether a key is for all modules."""
    return key.endswith(_ENDINGS) and unwrapped(key) in BASES


def share(modules: Iterable[Sharing], shared: Mapping[str, Tensor]) -> bool:
    """Gives the shared tensors to the modules that need them; their keys belong to the first of these.

    Returns whether there is one. Raises: LoraUnsupported if the bases are missing, or differ.
    """
    needing = [module for module in modules if "randlora_lambda" in module.slots]
    bases = {BASES[unwrapped(key)]: tensor for key, tensor in shared.items()}
    for module in needing:
        for slot in BASES.values():
            basis = bases.get(slot, module.slots.get(slot))
            if basis is None:
                raise LoraUnsupported(
                    "the file lacks RandLora's random bases, which PEFT makes anew on each machine",
                    "Set save_projection to true in its adapter_config.json, load it with PEFT on the "
                    "machine where it was trained, and save it again.",
                )
            bases[slot] = basis
            if not torch.equal(module.slots.setdefault(slot, basis), basis):
                raise LoraUnsupported("the file has different RandLora bases for different layers")
    for key in shared if needing else ():
        needing[0].keys[f"{key} of all"] = key
    return bool(needing)
