"""Finds an adapter's modules by its own names and shapes, where no model is at hand."""

from __future__ import annotations

from collections.abc import Iterator

from lora.formats.embeddings import BUNDLE, ENCODERS, word_keys
from lora.formats.header import Header
from lora.formats.names.families import evidence
from lora.formats.names.family import LANGUAGE, SD1, SD2, TRANSFORMERS
from lora.formats.names.keys import KeyMap
from lora.formats.names.prefixes import COMPONENTS, unwrapped
from lora.formats.names.sgm import SD_BLOCKS, SDXL_BLOCKS
from lora.formats.names.shapes import parameters_by
from lora.formats.names.slots import Shape, split_key

LARGE_CLIP = 1280
"""Numbers of a token in the second text encoder of SDXL."""


def component_of(stem: str, main: str) -> tuple[str, str]:
    """(component, path) of a module's name. `main`: the component of names without a prefix."""
    stem = unwrapped(stem)
    for component in sorted(COMPONENTS, key=lambda name: not name.startswith("text_encoder")):
        begun = [prefix for prefix in COMPONENTS[component].all if stem.startswith(prefix)]
        if begun:
            prefix = max(begun, key=len)
            path = stem.removeprefix(prefix)
            path = path.replace(".", "_") if prefix.endswith("_") else path
            text = component.startswith("text_encoder")
            return (component, path.removeprefix("text_model.")) if text else (main, path)
    return main, stem


def main_component(header: Header) -> str:
    """The component that draws, or writes, in the model which a file is for."""
    families = evidence(header)
    if families == {LANGUAGE}:
        return "model"
    named = any(key.startswith("transformer.") for key in header.tensors)
    return "transformer" if named or families & set(TRANSFORMERS) else "unet"


def own_key_map(header: Header) -> KeyMap:
    """A map of the modules that the file itself names, in the shapes that its tensors need.

    Every tensor that fits some model has a place in it; the rest is unused. A module's path is its name in
    the file without the component's prefix.
    """
    main = main_component(header)
    components: dict[str, dict[str, dict[str, Shape]]] = {main: {}}
    for (component, path), slots in _by_module(header, main).items():
        components.setdefault(component, {})[path] = parameters_by(slots)
    for component, width in _embedding_widths(header):
        modules = components.setdefault(component, {})
        modules.setdefault("embeddings.token_embedding", {"weight": (1, width)})
    # The file may name a few modules of many: which blocks there are is known of the family alone.
    families = evidence(header)
    old = families and families <= {SD1, SD2}
    named = {component: modules for component, modules in components.items() if modules}
    return KeyMap(named, SD_BLOCKS if old else SDXL_BLOCKS)


def _by_module(header: Header, main: str) -> dict[tuple[str, str], dict[str, Shape]]:
    modules: dict[tuple[str, str], dict[str, Shape]] = {}
    words = word_keys(header.tensors, header.tensors)
    for key, info in header.tensors.items():
        parts = None if key in words else split_key(key)
        if parts:
            modules.setdefault(component_of(parts[0], main), {})[parts[1]] = info.shape
    return modules


def _embedding_widths(header: Header) -> Iterator[tuple[str, int]]:
    for key in sorted(word_keys(header.tensors, header.tensors)):
        if shape := header.tensors[key].shape:
            kind = key.rpartition(".")[2] if key.startswith(BUNDLE) else key
            second = "text_encoder_2" if shape[-1] == LARGE_CLIP else "text_encoder"
            yield ENCODERS.get(kind, second), shape[-1]
