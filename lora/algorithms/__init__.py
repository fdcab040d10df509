"""The algorithms that adapters use, one file each, and the one table that lists them.

An algorithm is a frozen dataclass whose fields are the tensors of one layer of a file, under the slots'
names of `lora.keys`. To add one: write its file, add a row here and its suffixes to `keys.SLOTS`.

Semantics that all share: `delta` is computed in float32 at scale 1, and the engine rounds once, after it
added up everything; `alpha` missing or 0 means alpha = rank, as the trainers have it.
"""

from __future__ import annotations

from lora.algorithms.base import Algorithm, LowRank
from lora.algorithms.loha import LoHa
from lora.algorithms.lora import LoRA

ALGORITHMS: tuple[type[Algorithm], ...] = (LoRA, LoHa)

__all__ = ["ALGORITHMS", "Algorithm", "LoHa", "LoRA", "LowRank"]
