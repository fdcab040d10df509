"""An adapter as the tools see it: named tensors per module, whatever file they came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lora.formats.algorithms import recipes
from lora.formats.alphas import RANKED
from lora.formats.contents import UnusedKey
from lora.formats.names.keys import KeyMap, Target
from lora.formats.names.naming import Naming
from lora.formats.names.prefixes import PEFT_PREFIX


@dataclass(frozen=True, eq=False)
class Part:
    """One module's tensors."""

    target: Target
    slots: Mapping[str, Tensor]
    """Slot of `slots.SLOTS` -> tensor. What a config says of the module is included: its alpha, already
    multiplied by rs-LoRA's root, so that alpha / rank is always the scaling.
    """
    stem: str = ""
    """The module's name in the file."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Slot -> its key in the file; empty for a part that was not read from one."""

    @property
    def name(self) -> str:
        """The module's name for a person: the model's, or the file's if no model is known."""
        return self.stem if self.target.path == self.stem else str(self.target)

    @property
    def rank(self) -> int | None:
        """The inner dimension, by which alpha is divided; None if there is none."""
        factor = next(
            (self.slots[s] for s in RANKED if s in self.slots and self.slots[s].dim()), None
        )
        if factor is None and "b1" in self.slots and self.slots["b1"].dim() >= 2:
            return min(self.slots["b1"].shape[:2])
        return None if factor is None else factor.shape[0]

    @property
    def alpha(self) -> float | None:
        """The number that, divided by the rank, is the scaling; None if there is no rank."""
        if self.rank is None:
            return None
        value = float(self.slots["alpha"]) if "alpha" in self.slots else 0.0
        return value or float(self.rank)  # missing or 0: the trainers' own rule

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The algorithms of its tensors, in the order of `lora.formats.algorithms.ALGORITHMS`."""
        made, _ = recipes(frozenset(self.slots))
        return tuple(recipe.make(self.slots).name for recipe in made)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A whole adapter."""

    parts: tuple[Part, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, Tensor] = field(default_factory=dict)
    """Key -> vectors that teach a word of the prompt. Their keys are the same in every naming."""
    unused: tuple[UnusedKey, ...] = ()
    key_map: KeyMap | None = None
    """The names of the model that its modules belong to; None if only the file's own names are known."""
    has_config: bool = False
    """Whether its alphas were in a PEFT config."""

    @property
    def naming(self) -> Naming:
        """The naming that it was read in, as far as its keys show it."""
        if self.has_config:
            peft = any(part.stem.startswith(PEFT_PREFIX) for part in self.parts)
            return Naming.PEFT if peft else Naming.DIFFUSERS
        return Naming.ORIGINAL if any("." in part.stem for part in self.parts) else Naming.KOHYA


def rank_metadata(layers: Iterable[tuple[int | None, float | None]]) -> dict[str, str]:
    """kohya's `ss_network_dim` and `ss_network_alpha` for each layer's (rank, alpha): `Dynamic` where layers
    differ, as sd-scripts' `resize_lora.py` writes it.
    """
    ranked = [(rank, alpha) for rank, alpha in layers if rank]
    if not ranked:
        return {}
    ranks, alphas = map(set, zip(*ranked, strict=True))
    return {
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }
