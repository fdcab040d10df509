"""The keys of an adapter's tensors in a file: in a naming, or as they were read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora.errors import ToolError
from lora.formats.algorithms.peft_oft import PeftOFT
from lora.formats.names.naming import MAGNITUDE_OF, Namer, Naming, bare_path, suffix, trouble
from lora.formats.names.prefixes import COMPONENTS, PEFT_PREFIX
from lora.formats.names.slots import ONE_NUMBER
from lora.tools.adapters.parts import Adapter, Part
from lora.tools.adapters.peft_configs import USE_OTHER_NAMING


class PartNames:
    """The keys that the adapter was read with; tensors that are new get the suffixes of its naming."""

    def __init__(self, adapter: Adapter) -> None:
        self.naming = adapter.naming
        self.has_config = adapter.has_config and not any("alpha" in p.keys for p in adapter.parts)
        """Whether alphas go into a config."""

    def slots(self, part: Part) -> Mapping[str, Tensor]:
        """The part's tensors in the form that the naming has."""
        return part.slots

    def keys(self, part: Part, slots: Mapping[str, Tensor]) -> dict[str, str]:
        """Slot -> key, without what goes into a config. Raises: ToolError if the naming cannot express a
        slot."""
        # `turned_back` is told by the names, which stay.
        stored = [slot for slot in slots if slot != "turned_back"]
        keys = {slot: part.keys.get(slot) or self._new_key(part, slot) for slot in stored}
        return {slot: key for slot, key in keys.items() if key is not None}

    def _new_key(self, part: Part, slot: str) -> str | None:
        in_config = self.has_config and slot in ONE_NUMBER
        if in_config or (
            slot == "alpha" and part.alpha == part.rank
        ):  # no alpha means alpha = rank
            return None
        namings = (self.naming, Naming.ORIGINAL, Naming.PEFT)
        ending = next(text for naming in namings if (text := suffix(naming, slot)))
        return f"{part.stem}.{ending}"

    def component(self, part: Part) -> str:
        """The component whose config has the part; empty if the file names none."""
        first = part.stem.partition(".")[0]
        return part.target.component or (first if first in COMPONENTS else "")

    def config_path(self, part: Part) -> str:
        """The module's name in the config."""
        path = part.stem.removeprefix(f"{part.target.component}.")
        return path.removeprefix(PEFT_PREFIX).removeprefix("text_model.")


class _NewNames(PartNames):
    """The keys of another naming."""

    def __init__(self, namer: Namer) -> None:
        self._namer, self.naming = namer, namer.naming
        self.has_config = namer.naming.has_config

    def slots(self, part: Part) -> Mapping[str, Tensor]:
        return in_naming(part, self.naming)

    def keys(self, part: Part, slots: Mapping[str, Tensor]) -> dict[str, str]:
        why = trouble(self.naming, slots) or self._namer.trouble(part.target)
        if why:
            raise ToolError(f"{part.name}: {why}", USE_OTHER_NAMING)
        keys = {slot: self._namer.key(part.target, slot, slots) for slot in slots}
        return {slot: key for slot, key in keys.items() if key is not None}

    def component(self, part: Part) -> str:
        return part.target.component

    def config_path(self, part: Part) -> str:
        return bare_path(part.target)


def names_for(adapter: Adapter, naming: Naming | None) -> PartNames:
    """The keys of a naming; without one, those that the adapter was read with.

    Raises: ToolError for a naming if the model is not known.
    """
    if naming is None:
        return PartNames(adapter)
    if adapter.key_map is None:
        why = "the file's model is not known, so its modules have no other names"
        raise ToolError(why, "Name it with --model.")
    return _NewNames(Namer(naming, adapter.key_map))


def in_naming(part: Part, naming: Naming) -> dict[str, Tensor]:
    """A part's slots in the form of a naming: the name and shape of magnitudes, explicit alphas, factors with
    as many axes as the layer. Shapes may change, numbers do not.
    """
    slots = dict(part.slots)
    if not naming.has_config:
        alpha = part.alpha
        if alpha is not None and ("alpha" not in slots or float(slots["alpha"]) != alpha):
            slots["alpha"] = torch.tensor(alpha)
    if "oft_blocks" in slots:
        _rename_constraint(slots, naming)
    if "oft_r" in slots:
        flags = {slot: slots.pop(slot) for slot in ("turned_back", "scaled_oft") if slot in slots}
        slots["oft_r"] = PeftOFT(slots["oft_r"], **flags).plain()
    if "lora_up" in slots and "lora_down" in slots:
        axes = len(part.target.parameters.get("weight", ())) or slots["lora_down"].dim()
        _rename_magnitude(slots, slots["lora_up"].shape[0], axes, MAGNITUDE_OF[naming])
        if naming.has_config and "lora_mid" not in slots:
            kernel = part.target.parameters.get("weight", ())[2:]
            slots["lora_up"] = _with_axes(slots["lora_up"], axes, ())
            slots["lora_down"] = _with_axes(slots["lora_down"], axes, kernel)
    if naming is Naming.PEFT and not {"hada_t1", "lokr_t2"} & slots.keys():
        flat = {
            s: t.flatten(1) for s, t in slots.items() if s[:4] in ("hada", "lokr") and t.dim() > 2
        }
        slots |= flat
    return slots


def _rename_constraint(slots: dict[str, Tensor], naming: Naming) -> None:
    """ComfyUI's constraint of an OFT is the limit of its norm, LyCORIS' is that per row of the weight."""
    rows = slots["oft_blocks"].shape[-3] * slots["oft_blocks"].shape[-2]
    if naming is Naming.ORIGINAL and "alpha" in slots:
        slots["constraint"] = slots.pop("alpha").float() * rows
    elif naming is not Naming.ORIGINAL and "constraint" in slots:
        slots["alpha"] = slots.pop("constraint").float() / rows


def _with_axes(factor: Tensor, axes: int, kernel: tuple[int, ...]) -> Tensor:
    """A factor with as many axes as its layer; kohya gives linear layers factors of 1 x 1 convolutions."""
    if factor.dim() == axes:
        return factor
    if axes == 2:
        return factor.flatten(1)
    return factor.reshape(factor.shape[0], -1, *(kernel or (1,) * (axes - 2)))


def _rename_magnitude(slots: dict[str, Tensor], out: int, axes: int, wanted: str) -> None:
    """LyCORIS stores the magnitudes of a DoRA as [out, 1(, 1, 1)], PEFT as [out] or [1, out, 1, 1]."""
    other = "magnitude" if wanted == "dora_scale" else "dora_scale"
    tensor = slots.get(other)
    if tensor is None:
        return
    ones = (1,) * (axes - 2)
    of_inputs = tensor.dim() >= 2 and tensor.shape[0] == 1 and out != 1
    if wanted == "dora_scale":
        slots[wanted] = slots.pop(other).reshape(-1, 1, *ones)
    elif tensor.numel() == out and not of_inputs:
        values = slots.pop(other).flatten()
        slots[wanted] = values.reshape(1, -1, *ones) if ones else values
