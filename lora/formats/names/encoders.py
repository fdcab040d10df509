"""Which text encoder a file is for whose names do not say it: PEFT saves each network into its own folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lora.errors import LoraUnsupported
from lora.formats.header import TensorInfo
from lora.formats.names.keys import KeyMap
from lora.formats.names.prefixes import unwrapped
from lora.formats.names.shapes import inputs_by
from lora.formats.names.slots import Shape, split_key

_OWN = re.compile(
    r"(?:text_model\.)?(?:encoder\.layers\.\d|embeddings\.|final_layer_norm\.)|text_projection\."
)
"""How the names of a text encoder's own modules begin."""


def encoder_of(
    tensors: Mapping[str, TensorInfo], keys: Iterable[str], key_map: KeyMap
) -> str | None:
    """The text encoder that has the modules of these keys, in their widths; None if none has.

    Raises: LoraUnsupported if more than one has them.
    """
    modules: dict[str, dict[str, Shape]] = {}
    for key in keys:
        bare = unwrapped(key)
        if _OWN.match(bare) and (parts := split_key(bare)):
            modules.setdefault(parts[0], {})[parts[1]] = tensors[key].shape
    components = [name for name in key_map.components if name.startswith("text_encoder")]
    fitting = [name for name in components if modules and _fits(name, modules, key_map)]
    if len(fitting) > 1:
        raise LoraUnsupported(
            f"the file does not say whether it is for {' or '.join(fitting)}, which both have its modules",
            f"Begin its names with {fitting[0]}. or {fitting[1]}.",
        )
    return fitting[0] if fitting else None


def _fits(component: str, modules: Mapping[str, Mapping[str, Shape]], key_map: KeyMap) -> bool:
    for path, slots in modules.items():
        target = key_map.find(f"{component}.{path}")
        shape = target.parameters.get("weight", ()) if target else ()
        inputs = inputs_by(slots)
        if not shape or (inputs and len(shape) > 1 and inputs != shape[1]):
            return False
    return True
