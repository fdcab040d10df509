"""Trainers' names for the tensors of an adapter -> component, module and slot. Strings only.

A tensor's key is a stem (which module), a dot and a suffix (which tensor of the algorithm). Suffixes come
from the table `SLOTS`. Stems are looked up in a dictionary of all names that any trainer gives to the
modules of the loaded pipeline, made from the modules' own paths. So underscores are never parsed, and a
key either means exactly one module or is reported as unknown. The table of suffixes is `slots.SLOTS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from lora.formats.names.families import CROSS_ATTENTION_WIDTHS, families_by_names
from lora.formats.names.family import Families
from lora.formats.names.prefixes import COMPONENTS, PEFT_PREFIX, other_forms, prefixes_of
from lora.formats.names.sgm import Blocks, block_of, sgm_path
from lora.formats.names.slots import MAX_KEY, Shape, named_slot
from lora.formats.names.wan import wan_path

_MAIN_PREFIXES = ("", PEFT_PREFIX, "transformer.")
"""Further prefixes of the first component: none, PEFT's, and diffusers' for models that draw."""

ALONE = "lora_te_"
"""What kohya writes before the text encoder of a model that has one; it numbers them where there are two."""

MODULATIONS = ("modulation", "scale_shift_table")
"""The names that models have for the table that `diff_m` changes."""


@dataclass(frozen=True, eq=False)
class Target:
    """One module of the pipeline that an adapter can change. One object per module of a `KeyMap`."""

    component: str
    path: str
    parameters: Mapping[str, Shape]
    """Its own parameters' shapes; a weight's is [out, in(, kh, kw)], however the module stores it."""
    block: str
    """Which block of a UNet it is in: IN00 to IN08, MID, OUT00 to OUT08, else BASE."""

    def parameter(self, wanted: str) -> str | None:
        """The module's own name for what an algorithm changes; None if it has no such parameter."""
        if wanted in self.parameters:
            return wanted
        names = MODULATIONS if wanted == "modulation" else ()
        return next((name for name in names if name in self.parameters), None)

    def __str__(self) -> str:
        return f"{self.component}.{self.path}"


class Match(NamedTuple):
    """What a key means."""

    target: Target
    slot: str
    """One of the values of `SLOTS` or `STEPS`, or `?` and the key's suffix if that is not known."""
    stem: str
    """The module's name in the file, without what wrappers put into it."""
    adapter: str = ""
    """The adapter's name in the key, where PEFT left one."""


class KeyMap:
    """All names that trainers may give to the modules of one pipeline. Built once, never changed."""

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, Mapping[str, Shape]]],
        blocks: Blocks | None = None,
    ) -> None:
        """`modules`: component -> module path -> parameter -> shape; the first component draws.

        `blocks`: those of the UNet, if only some of its modules are known, by the names in a file. Two names
        there may mean one module: then the first module has both.
        Raises: ValueError if two modules share a name, since a key with that name would be ambiguous.
        """
        self._targets: dict[str, Target] = {}
        self.components = tuple(modules)
        for component, paths in modules.items():
            main = component == self.components[0]
            own = (blocks or Blocks.of(paths)) if component == "unet" else None
            for path, parameters in paths.items():
                sgm = sgm_path(path, own) if own else None
                target = Target(component, path, parameters, block_of(sgm or ""))
                names = _names(component, _paths(component, path, sgm, paths), main=main)
                for name in names:
                    if name.startswith(ALONE) and "text_encoder_2" in modules:
                        continue
                    other = self._targets.setdefault(name, target)
                    if other is not target and blocks is None:
                        raise ValueError(f"{name!r} would mean both {other} and {target}")

    @cached_property
    def targets(self) -> frozenset[Target]:
        """Every module that has a name."""
        return frozenset(self._targets.values())

    @cached_property
    def cross_attention(self) -> int | None:
        """How many values per token a U-Net's cross attention reads."""
        ends = (t.parameters["weight"] for t in self.targets if t.path.endswith(".attn2.to_k"))
        widths = {shape[1] for shape in ends}
        return widths.pop() if len(widths) == 1 else None

    @cached_property
    def families(self) -> Families:
        """The families that this model may belong to; empty if its names show none.

        A narrow model of a family's topology belongs to the family.
        """
        main = self.components[0] if self.components else ""
        names = families_by_names(t.path for t in self.targets if t.component == main)
        family = CROSS_ATTENTION_WIDTHS.get(self.cross_attention or 0)
        return frozenset({family}) if family in names else names

    def find(self, name: str) -> Target | None:
        """The module that trainers call by this name."""
        return self._targets.get(name)

    def match(self, key: str) -> Match | None:
        """The module and the slot of a key. The stem is its longest beginning that is a module's name;
        None if it has none, with the words of wrappers and without. A form with a known slot goes before one
        without: a wrapper may stand between the module and the suffix.
        """
        if len(key) > MAX_KEY:
            return None
        match = self._match(key)
        if match and match.slot[0] != "?":
            return match
        others = [other for other in map(self._match, other_forms(key)) if other]
        known = (other for other in others if not other.slot.startswith("?"))
        return next(known, match or next(iter(others), None))

    def _match(self, key: str) -> Match | None:
        stem, dot, suffix = key.rpartition(".")
        while dot:
            if target := self._targets.get(stem):
                slot, adapter = named_slot(suffix)
                return Match(target, slot, stem, adapter)
            stem, dot, more = stem.rpartition(".")
            suffix = f"{more}.{suffix}"
        return None

    def missing_component(self, key: str) -> str | None:
        """The component that a key is for, if this pipeline does not have it."""
        meant = [name for name, prefixes in COMPONENTS.items() if key.startswith(prefixes.all)]
        return None if set(meant) & set(self.components) else next(iter(meant), None)


def _names(component: str, paths: Iterable[str], *, main: bool) -> Iterator[str]:
    """Every stem that means the module with these paths."""
    prefixes = {*prefixes_of(component).all, *(_MAIN_PREFIXES if main else ())}
    for path in paths:
        for prefix in prefixes:
            if not prefix.endswith("_"):
                yield prefix + path
            elif path:
                yield prefix + path.replace(".", "_")


_OLD_ATTENTION = re.compile(r"(.*attn\d?)\.to_(q|k|v|out)(\.0)?")
_OLD_CLIP = re.compile(r"(.*self_attn)\.(q|k|v|out)_proj")


def _paths(
    component: str, path: str, sgm: str | None, siblings: Mapping[str, object]
) -> Iterator[str]:
    """All dotted paths that trainers use for a module."""
    if component.startswith("text_encoder"):
        # transformers 5 dropped `text_model.` from CLIPTextModel, and trainers still write it.
        bare = path.removeprefix("text_model.")
        both = {bare, f"text_model.{bare}"} if bare != "text_projection" else {bare}
        yield from sorted(both)
        if old := _OLD_CLIP.fullmatch(bare):
            yield f"text_model.{old[1]}.to_{old[2]}_lora"
        return
    yield path
    if sgm and sgm != path:
        yield sgm
    if old := _OLD_ATTENTION.fullmatch(path):
        yield f"{old[1]}.processor.to_{old[2]}_lora"
        yield f"{old[1]}.to_{old[2]}_lora"
    if "condition_embedder.time_proj" in siblings:
        wan = wan_path(path)
        if wan != path:
            yield wan
