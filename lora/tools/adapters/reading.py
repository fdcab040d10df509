"""An adapter file as named tensors per module, whatever wrote it, and with no model at hand if need be.

Every tensor of a file is in a part, among the words that it teaches, or listed as unused with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lora.errors import ToolError
from lora.formats.adapter import UNKNOWN_MODULE, UnusedKey, a_model
from lora.formats.algorithms import recipes
from lora.formats.alphas import CONFIG_IN_FILE, Alphas
from lora.formats.embeddings import is_embedding
from lora.formats.header import Header, read_header
from lora.formats.names.keys import COMPONENTS, REFUSED, KeyMap, Match, Target
from lora.formats.tensors import read_runs
from lora.tools.adapters.opening import opened
from lora.tools.adapters.own_names import split_key
from lora.tools.adapters.parts import Adapter, Part


def read_adapter(
    path: Path,
    key_map: KeyMap | None = None,
    *,
    allow_unused: bool = False,
    check_shapes: bool = True,
) -> Adapter:
    """Reads a .safetensors file, a pickle of torch.save (which is never run), or a PEFT folder.

    With `key_map` the modules are that model's, and their tensors must fit its shapes, unless
    `check_shapes` is False: then it is asked for names alone. Without, the file's own names stand for the
    modules: enough for whatever keeps them. Nothing is mapped: the file may be replaced.

    Raises: ToolError if a tensor cannot be carried, unless `allow_unused`, which lists it as unused, and if
    none can; LoraNotFound, LoraCorrupt, LoraUnsupported for a file that is none.
    """
    with opened(path) as found:
        adapter = _read(found.file, found.config, key_map, check_shapes)
    if adapter.unused and not allow_unused:
        first, count = adapter.unused[0], len(adapter.unused)
        raise ToolError(
            f"{count} of the tensors in {path.name} cannot be carried ({first.key[:200]}: {first.reason})",
            "--allow-unused leaves them out.",
        )
    if not adapter.parts and not adapter.words:
        raise ToolError(f"{path.name} holds no adapter ({adapter.unused[0].reason})")
    return adapter


def header_of(path: Path) -> Header:
    """Names, shapes and metadata of an adapter that `read_adapter` reads; a pickle is read for it.

    Raises: as `read_adapter`.
    """
    with opened(path) as found:
        return read_header(found.file)


def _read(path: Path, config: str | None, key_map: KeyMap | None, check: bool) -> Adapter:
    header = read_header(path)
    alphas = Alphas.of(header.metadata, config)
    tensors = {
        name: t for run in read_runs(path, header, mapped=False) for name, t in run.tensors()
    }
    match = key_map.match if key_map else _by_own_names()
    found: dict[Target, _Found] = {}
    words: dict[str, Tensor] = {}
    unused: list[UnusedKey] = []
    adapter = False
    for key, tensor in tensors.items():
        meant = match(key)
        if meant is None and is_embedding(key):
            words[key] = tensor
        elif meant is None:
            unused.append(
                UnusedKey(key, UNKNOWN_MODULE if key_map else "no known name of a tensor")
            )
        else:
            adapter = adapter or key[len(meant.stem) + 1 :] not in ("weight", "bias")
            keys = found.setdefault(meant.target, _Found(meant.stem)).keys
            if keys.setdefault(meant.slot, key) is not key:
                unused.append(UnusedKey(key, f"says the same as {keys[meant.slot][:200]}"))
    if found and not adapter:
        raise a_model()
    parts: list[Part] = []
    for target, names in found.items():
        slots = _completed(
            {s: tensors[k] for s, k in names.keys.items()}, target, names.stem, alphas
        )
        if reason := _trouble(slots) or (_misfit(target, slots) if key_map and check else None):
            unused += [UnusedKey(key, reason) for key in names.keys.values()]
        else:
            parts.append(Part(target, slots, names.stem, names.keys))
    has_config = config is not None or CONFIG_IN_FILE in header.metadata
    return Adapter(tuple(parts), header.metadata, words, tuple(unused), key_map, has_config)


@dataclass
class _Found:
    stem: str
    keys: dict[str, str] = field(default_factory=dict)


def _by_own_names() -> Callable[[str], Match | None]:
    """As `KeyMap.match`, with a module for each name that stands before a suffix that is known."""
    targets: dict[str, Target] = {}

    def match(key: str) -> Match | None:
        found = split_key(key)
        if found is None or is_embedding(key):
            return None
        stem, slot = found
        if stem not in targets:
            component = stem.partition(".")[0]
            component = component if component in COMPONENTS else ""
            targets[stem] = Target(component, stem, {}, "BASE")
        return Match(targets[stem], slot, stem)

    return match


def _completed(
    slots: dict[str, Tensor], target: Target, stem: str, alphas: Alphas
) -> dict[str, Tensor]:
    """With what a config says. A tensor that it does not change stays as the file has it."""
    only = next(iter(alphas.configs)) if len(alphas.configs) == 1 else ""
    before = dict(slots)
    alphas.complete(slots, target.component or only, stem)
    for slot, tensor in before.items():
        if slots[slot] is not tensor and torch.equal(slots[slot], tensor.to(slots[slot].dtype)):
            slots[slot] = tensor
    return slots


def _trouble(slots: Mapping[str, Tensor]) -> str | None:
    """Why a module's tensors make up no algorithm that is known."""
    for slot, tensor in slots.items():
        if slot in REFUSED:
            return REFUSED[slot]
        if slot.startswith("?"):
            return "no known algorithm has such a tensor"
        if slot in ("alpha", "on_input", "neumann_terms") and tensor.numel() != 1:
            return f"{slot} is not one number"
        if 0 in tensor.shape:
            return "a tensor is empty"
    found, left = recipes(frozenset(slots))
    return None if found and not left - {"alpha"} else "a part of the module's tensors is missing"


def _misfit(target: Target, slots: Mapping[str, Tensor]) -> str | None:
    for recipe in recipes(frozenset(slots))[0]:
        part = recipe.make(slots)
        parameter = target.parameter(part.parameter)
        if parameter is None:
            return f"the module has no {part.parameter}"
        if misfit := part.misfit(target.parameters[parameter]):
            return misfit
    return None
