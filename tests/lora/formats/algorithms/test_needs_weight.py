"""Whether a change depends on the weight is what the tools ask before they compute it without a model."""

from __future__ import annotations

import pytest
import torch

from lora.formats.algorithms import ALGORITHMS, Algorithm
from lora.formats.algorithms.adalora import AdaLoRA
from lora.formats.algorithms.hra import HRA
from lora.formats.algorithms.miss import MiSS
from lora.formats.algorithms.peft_boft import PeftBOFT
from lora.formats.algorithms.randlora import RandLoRA
from tests.adapters import randn
from tests.lora import small

FURTHER: tuple[Algorithm, ...] = (
    AdaLoRA(randn(2, 12), randn(8, 2), randn(2, 1)),
    HRA(randn(12, 2)),
    MiSS(randn(4, 8)),
    MiSS(randn(4, 2, 2)),
    PeftBOFT(randn(2, 2, 6, 6), randn(8, 1)),
    RandLoRA(randn(2, 4), randn(4, 8), randn(2, 1, 8), randn(12, 4, 2)),
)
PARTS = [
    *(
        (name, layer.algorithm, layer.target.parameters[layer.parameter])
        for name in small.NAMES
        for layer in small.adapter(name).layers
    ),
    *((part.name, part, (8, 12)) for part in FURTHER),
]


@pytest.mark.parametrize(("name", "part", "shape"), PARTS, ids=[name for name, _, _ in PARTS])
def test_what_says_that_it_needs_no_weight_is_the_same_for_all(
    name: str, part: Algorithm, shape: tuple[int, ...]
) -> None:
    changes = [part.delta(randn(*shape, seed=seed)) for seed in (1, 2)]
    assert torch.equal(*changes) is not part.needs_weight, name


def test_every_algorithm_is_among_them() -> None:
    made = {type(getattr(part, "inner", part)) for _, part, _ in PARTS}
    known = {kind.__name__ for kind in set(ALGORITHMS) - made}
    assert known == {"ModulationDifference", "BiasValue"}
