"""Weighs what a file says of itself against the model, before any layer is bound: header and names alone.

A file that another family's evidence speaks for is refused, and so is one whose larger part has no place in
the model, unless its metadata says that it is for this model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora.errors import LoraIncompatible, LoraUnsupported
from lora.formats.alphas import BASE_MODEL
from lora.formats.embeddings import word_keys
from lora.formats.header import Header, TensorInfo
from lora.formats.names.families import (
    CROSS_ATTENTION_WIDTHS,
    cross_attention_width,
    evidence,
    named,
)
from lora.formats.names.family import ALL, LANGUAGE, claimed
from lora.formats.names.keys import KeyMap
from lora.formats.names.others import other_kind
from lora.formats.names.prefixes import COMPONENTS
from lora.formats.names.slots import BARE, is_bare

TEXT = tuple(
    prefix for name in COMPONENTS if name.startswith("text") for prefix in COMPONENTS[name].all
)
"""How names begin that are for text encoders."""

HINT = "Choose a LoRA that was made for this model."


@dataclass
class Keys:
    """What the keys of a file are to a model."""

    words: list[str] = field(default_factory=list)
    """Words for the prompt."""
    shared: list[str] = field(default_factory=list)
    """For all modules."""
    strangers: list[str] = field(default_factory=list)
    """No module of the model has such a name."""
    elsewhere: int = 0
    """How many of the strangers are for a component that the model lacks."""
    bound: int = 0
    """How many have a module."""
    drawing: int = 0
    """How many of those are for the component that draws."""
    adapter: int = 0
    """How many belong to modules with an adapter's tensors."""
    bare: int = 0
    """How many a model's own parameters would have, and nothing of an adapter stands beside them."""
    has_config: bool = False
    """Whether a PEFT config says what they are."""

    def tell_words(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Parts the words from the strangers. `tensors`: all of the file."""
        words = word_keys(self.strangers, tensors) if self.strangers else ()
        if words:
            self.words = [key for key in self.strangers if key in words]
            self.strangers = [key for key in self.strangers if key not in words]

    def count(self, keys: Mapping[str, str], *, draws: bool) -> None:
        """Adds a module's keys, by their slots. `draws`: whether it is of the component that draws."""
        self.bound += len(keys)
        self.drawing += len(keys) * draws
        if keys.keys() <= BARE and all(is_bare(key) for key in keys.values()):
            self.bare += len(keys)
        elif not all(slot.startswith("?") for slot in keys):
            self.adapter += len(keys)


def refuse_strangers(
    header: Header, key_map: KeyMap, keys: Keys, base_model: str, *, widths: bool
) -> None:
    """Raises: LoraIncompatible if the file is for another family or has no place for its larger part;
    LoraUnsupported if it holds a model's own weights.

    `base_model`: the one that a PEFT config names. `widths`: whether the model's are those of `key_map`.
    """
    if kind := other_kind(keys.strangers):
        raise LoraIncompatible(f"the file is {kind}, and not for this model", HINT)
    if keys.bare > keys.adapter and not keys.has_config:
        kind, count = other_kind(header.tensors) or "a model", keys.adapter or "none"
        raise LoraUnsupported(
            f"the file holds {kind}'s own weights, and {count} of an adapter",
            "Extract a LoRA from it first.",
        )
    ours, claim = key_map.families, claimed({BASE_MODEL: base_model, **header.metadata})
    says_so = claim in ours
    text = sum(key.startswith(TEXT) for key in keys.strangers)
    theirs = evidence(header, keys.strangers) if keys.strangers and ours else frozenset()
    if theirs and not theirs & ours and not (says_so and keys.bound > len(keys.strangers)):
        name = claim if claim in theirs else named(theirs)
        raise LoraIncompatible(f"{_made_for(name)}{_example(keys)}", HINT)
    if widths:
        _refuse_width(header, key_map)
    if claim and ours and not says_so and not _refuted(claim, header, ours):
        raise LoraIncompatible(f"{_made_for(claim)}, as its metadata says", HINT)
    strangers = len(keys.strangers) - keys.elsewhere
    # A text encoder that many models have does not speak for the part that draws.
    if keys.bound and not says_so and (strangers > keys.bound or strangers - text > keys.drawing):
        raise LoraIncompatible(
            f"the larger part of the file, {strangers} of its {strangers + keys.bound} tensors, has no place "
            f"in this model{_example(keys)}"
            if strangers > keys.bound
            else f"the part of the file that draws has no place in this model{_example(keys)}",
            HINT,
        )


def _made_for(name: str | None) -> str:
    return f"the file was made for {'a ' * (name == LANGUAGE)}{name}"


def _example(keys: Keys) -> str:
    return f" ({keys.strangers[0][:200]} is no module of this model)"


def _refuted(claim: str, header: Header, ours: frozenset[str]) -> bool:
    """Whether the file's names and widths contradict its metadata, and are this model's."""
    found = evidence(header)
    return bool(found) and found <= ours and claim in ALL and claim not in found


def _refuse_width(header: Header, key_map: KeyMap) -> None:
    width, ours = cross_attention_width(header), key_map.cross_attention
    if width and ours and width != ours:
        # Metadata may name a family whose width this is not: the demo's LoRAs are SDXL's in all but size.
        family = CROSS_ATTENTION_WIDTHS.get(width)
        made_for = f"{family}, whose" if family else "a model whose"
        raise LoraIncompatible(
            f"{_made_for(made_for)} cross attention reads {width} values per token, "
            f"and this model's reads {ours}",
            HINT,
        )
