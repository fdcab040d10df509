"""The settings that PEFT and diffusers keep beside the tensors: alphas, and how they scale.

PEFT writes them to `adapter_config.json`; diffusers puts one such config per component into the file's
metadata, as JSON under `lora_adapter_metadata` with names such as `unet.lora_alpha`. A network's own
`save_lora_adapter` writes them without the component.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora.errors import LoraCorrupt, LoraUnsupported
from lora.formats.names.prefixes import PEFT_PREFIX
from lora.formats.peft_fields import refuse_unread

RANKED = ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""The slots whose first dimension is the rank."""

SCALED = ("lora_up", "lora_up_bias", "hada_w1_a", "lokr_w1", "lokr_w1_a")
"""The slots of which the change is a multiple."""

NEUMANN_TERMS, MAX_NEUMANN_TERMS, OFT_EPS = 5, 100, 6e-5
"""PEFT's default number of terms for OFT, the largest number that is read, and PEFT's default `eps`."""

ALPHA, RANK, RANDLORA_ALPHA = 8, 8, 640
"""PEFT's defaults."""

MAX_SCALING = 1e30
"""A larger number would overflow when it is multiplied in float32."""

BASE_MODEL = "base_model_name_or_path"
"""PEFT's field for the model that was trained."""

CONFIG_IN_FILE = "lora_adapter_metadata"
"""The key of a file's metadata under which diffusers stores PEFT's config, one table for all components."""


@dataclass(frozen=True)
class Alphas:
    """One PEFT config per component; the one with the empty name is for all that have none."""

    configs: Mapping[str, PeftConfig]
    base_model: str = ""
    """The base model that a config names."""

    @classmethod
    def of(cls, metadata: Mapping[str, str], config: str | None = None) -> Alphas:
        """From a file's metadata and, if there is one, the text of its `adapter_config.json`.

        Raises: LoraCorrupt if either is not what PEFT writes; LoraUnsupported for a field or a pattern that
        is not read.
        """
        source = CONFIG_IN_FILE
        try:
            configs: dict[str, Any] = {}
            for key, value in json.loads(metadata.get(source, "{}")).items():
                component, _, option = key.rpartition(".")
                configs.setdefault(component, {})[option] = value
            if config is not None:
                source = "adapter_config.json"
                configs[""] = json.loads(config)
            bases = [str(fields.get(BASE_MODEL) or "") for fields in configs.values()]
            made = {name: PeftConfig.of(fields) for name, fields in configs.items()}
            return cls(made, next(filter(None, bases), ""))
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise LoraCorrupt(f"the file's {source} is malformed") from error

    def complete(self, slots: dict[str, Tensor], component: str, name: str) -> str | None:
        """Adds what the config says of a layer to its tensors; returns a reason if they contradict it.

        `name`: the layer's name in the file.
        """
        config = self.configs.get(component, self.configs.get(""))
        if config is None:
            return None
        if config.dora and "lora_up" in slots and not {"magnitude", "dora_scale"} & slots.keys():
            return "the PEFT config says use_dora, and the magnitudes are missing"
        # PEFT's patterns are for the model's own names, without a prefix.
        name = name.removeprefix(f"{component}.").removeprefix(PEFT_PREFIX)
        if "oft_r" in slots and slots["oft_r"].dim() == 2:
            _complete_oft(slots, config)
        elif "ia3_l" in slots and config.feedforward is not None:
            slots["on_input"] = torch.tensor(config.feedforward.find(name) is not None)
        elif "hra_u" in slots:
            slots["gram_schmidt"] = torch.tensor(config.gram_schmidt)
        elif "randlora_lambda" in slots:
            slots["randlora_alpha"] = torch.tensor(config.randlora_alpha)
        elif "ada_e" in slots:
            slots["ada_scaling"] = torch.tensor(config.ada_scaling)
        elif "alpha" not in slots:
            _complete_alpha(slots, config, name)
        return None


@dataclass(frozen=True)
class PeftConfig:
    """The settings of a PEFT config that change what its tensors do."""

    alpha: float
    rank: float
    alphas: Patterns
    ranks: Patterns
    rs_lora: bool
    dora: bool
    neumann_terms: int
    """0 for the exact transform."""
    oft_limit: float | None
    """The limit for the norm of constrained OFT; None where it is not constrained."""
    feedforward: Patterns | None
    """The modules whose IA3 factors belong to the inputs."""

    gram_schmidt: bool
    """Whether HRA's vectors are made orthogonal."""
    ada_scaling: float
    """AdaLoRA's scaling of every layer."""
    randlora_alpha: float

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> PeftConfig:
        """Raises: ValueError, TypeError or AttributeError if the fields are not what peft writes;
        LoraUnsupported for a field or a pattern that is not read.
        """
        refuse_unread(fields)
        alpha = fields.get("alpha") if fields.get("lora_alpha") is None else fields["lora_alpha"]
        terms = int(fields.get("num_cayley_neumann_terms") or NEUMANN_TERMS)
        if not 0 < terms <= MAX_NEUMANN_TERMS:
            raise ValueError("num_cayley_neumann_terms")
        ada = fields.get("peft_type") == "ADALORA"  # whose patterns are masks of ranks
        return cls(
            alpha=_finite(ALPHA if alpha is None else alpha),
            rank=_finite(RANK if fields.get("r") is None else fields["r"]),
            alphas=Patterns.of(fields.get("alpha_pattern") or {}),
            ranks=Patterns.of({} if ada else fields.get("rank_pattern") or {}),
            rs_lora=bool(fields.get("use_rslora")),
            dora=bool(fields.get("use_dora")),
            neumann_terms=0 if fields.get("use_cayley_neumann") is False else terms,
            oft_limit=_finite(fields.get("eps") or OFT_EPS) if fields.get("coft") else None,
            feedforward=_modules(fields.get("feedforward_modules")),
            gram_schmidt=bool(fields.get("apply_GS")),
            ada_scaling=_ada_scaling(fields) if ada else 1.0,
            randlora_alpha=_finite(fields.get("randlora_alpha", RANDLORA_ALPHA)),
        )


@dataclass(frozen=True)
class Patterns:
    """A table of PEFT's: patterns of module names, each with a number. The first pattern that fits counts.

    A pattern fits a name if it matches the whole name, or all that follows one of its dots.
    """

    plain: Mapping[str, tuple[int, float]]
    """Patterns that are plain names -> index in the table and number: one look-up for hundreds of them."""
    others: tuple[tuple[int, re.Pattern[str], float], ...]

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Patterns:
        """Raises: ValueError, TypeError or AttributeError if it is no such table."""
        plain: dict[str, tuple[int, float]] = {}
        others = []
        for index, (pattern, value) in enumerate(table.items()):
            if re.fullmatch(r"[\w.]+", pattern):
                plain[pattern] = index, _finite(value)
            else:
                others.append((index, _compiled(pattern), _finite(value)))
        if len(others) > MAX_PATTERNS:
            raise ValueError("too many patterns")
        return cls(plain, tuple(others))

    def find(self, name: str) -> float | None:
        """The number of a module; None if no pattern fits its name."""
        fitting, rest = [], name
        while rest:
            if rest in self.plain:
                fitting.append(self.plain[rest])
            rest = rest.partition(".")[2]
        fitting += [(index, value) for index, pattern, value in self.others if pattern.match(name)]
        return min(fitting)[1] if fitting else None


MAX_PATTERNS, MAX_PATTERN, MAX_REPEATS = 100, 300, 2
"""Bounds within which no pattern can take long: anyone may have written the file."""
_SIMPLE = re.compile(r"\^?(?:[\w.|()]|\\[.\w]|\[[^\]\[]*\]|(?:\.|\\d|\\w|\[[^\]\[]*\])[*+])*\$?")
_REPEATED = re.compile(r"(?<!\\)[*+]")


def _compiled(pattern: str) -> re.Pattern[str]:
    """The pattern as PEFT uses it. Raises: LoraUnsupported for one that could take very long; ValueError."""
    repeats = len(_REPEATED.findall(pattern))
    groups = pattern.count("(") - pattern.count("\\(")
    simple = len(pattern) <= MAX_PATTERN and repeats <= MAX_REPEATS and groups <= 1
    if not simple or not _SIMPLE.fullmatch(pattern):
        raise LoraUnsupported(
            "the PEFT config has a pattern of layer names that is not simple",
            "Write the names out: at most two repetitions and one group are read.",
        )
    try:
        return re.compile(rf"(?:.*\.)?(?:{pattern})$")
    except re.error as error:
        raise ValueError("no pattern") from error


def _modules(names: object) -> Patterns | None:
    """PEFT's lists of modules: endings of names, or one pattern for the whole name."""
    names = [f"^{names}"] if isinstance(names, str) else names
    if not isinstance(names, list | None):
        raise TypeError("no list of modules")
    return None if names is None else Patterns.of(dict.fromkeys(names, 1))


def _finite(value: Any) -> float:
    number = float(value)
    if not abs(number) <= MAX_SCALING:
        raise ValueError("not a number that can be used")
    return number


def _complete_alpha(slots: dict[str, Tensor], config: PeftConfig, name: str) -> None:
    own_alpha = config.alphas.find(name)
    alpha = config.alpha if own_alpha is None else own_alpha
    if not alpha:
        # To PEFT 0 is a scaling of 0; to kohya, whose tensor this would be, it is none.
        slots |= {slot: torch.zeros_like(slots[slot]) for slot in SCALED if slot in slots}
        return
    rank = next((slots[s].shape[0] for s in RANKED if s in slots and slots[s].dim()), None)
    if rank is not None:
        # rsLoRA (arXiv 2312.03732): scaling = alpha / sqrt(rank).
        slots["alpha"] = torch.tensor(alpha * (math.sqrt(rank) if config.rs_lora else 1.0))
    elif "lokr_w1" in slots and "lokr_w2" in slots:
        # PEFT scales a LoKr by alpha / r even where both factors are whole; LyCORIS does not.
        whole = config.ranks.find(name) or config.rank
        if whole and alpha != whole:
            slots["lokr_w1"] = slots["lokr_w1"].float() * (alpha / whole)


def _ada_scaling(fields: Mapping[str, Any]) -> float:
    """As `AdaLoraLayer` and its `get_delta_weight` compute it, with PEFT's defaults.

    Raises: LoraUnsupported for an alpha of 0, in whose place PEFT takes each layer's own rank.
    """
    alpha, rank = _finite(fields.get("lora_alpha", 8)), _finite(fields.get("init_r", 12))
    if alpha <= 0 or rank <= 0:
        raise LoraUnsupported("the PEFT config says lora_alpha or init_r = 0, which is not read")
    return alpha / (rank + 1e-5)


def _complete_oft(slots: dict[str, Tensor], config: PeftConfig) -> None:
    slots["neumann_terms"] = torch.tensor(config.neumann_terms)
    if config.oft_limit is not None:
        # `OFTRotationModule._project_batch`: the forward holds each block's norm to eps / sqrt(blocks).
        vectors = slots["oft_r"].float()
        limit = config.oft_limit / math.sqrt(max(1, vectors.shape[0]))
        norms = vectors.norm(dim=1, keepdim=True) * math.sqrt(2)  # of the whole skew matrix
        if bool((norms > limit).any()):
            slots["oft_r"] = torch.where(norms <= limit, vectors, vectors * (limit / norms))
