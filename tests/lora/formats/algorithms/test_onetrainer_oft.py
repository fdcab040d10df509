"""OneTrainer's OFT with what its pull requests add, against slow formulas of its own forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora.engine.engine import LoraEngine
from lora.errors import LoraIncompatible, LoraUnsupported
from lora.formats.algorithms.peft_oft import PeftOFT
from tests.adapters import randn
from tests.lora.checks import bind, relative_error
from tests.lora.small import small

SIZE = 4
NAMES = {"linear": "lora_unet_linear", "conv": "lora_unet_conv"}


def skew_of(vectors: Tensor) -> Tensor:
    skew = torch.zeros(len(vectors), SIZE, SIZE, dtype=torch.float64)
    rows, columns = torch.triu_indices(SIZE, SIZE, 1)
    skew[:, rows, columns] = vectors.double()
    return skew - skew.transpose(1, 2)


def series(skew: Tensor) -> Tensor:
    """`OFTRotationModule._cayley_batch` with five terms."""
    square = skew @ skew
    one = torch.eye(SIZE, dtype=torch.float64)
    return one + 2 * skew + 2 * square + 2 * square @ skew + square @ square


def clipped(skew: Tensor, limit: float) -> Tensor:
    """Pull request 1492, with its power iteration run until nothing changes, as training runs it."""
    u = randn(len(skew), SIZE, 1, seed=5).double()
    for _ in range(2000):
        v = torch.nn.functional.normalize(skew.mT @ u, dim=1)
        u = torch.nn.functional.normalize(skew @ v, dim=1)
    norm = (u * (skew @ v)).sum(1, keepdim=True)
    return skew * (limit / norm.clamp_min(limit))


def iterated(skew: Tensor) -> Tensor:
    """Pull request 1512: seven Newton-Schulz steps from (I + Q)^2, with Chebyshev's best coefficients."""
    x = torch.eye(SIZE, dtype=torch.float64) + 2 * skew + skew @ skew
    largest = x.abs().sum(-1, keepdim=True).amax(-2, keepdim=True)
    x, low, high = x / largest, 1 / largest, torch.ones_like(largest)
    for _ in range(7):
        mean = (low**2 + low * high + high**2) / 3
        big, little = 2 * mean**1.5, low * high * (low + high)
        factor = 6 / (big + little)
        x = factor * mean * x - factor / 3 * (x @ x.mT @ x)
        rest = (big - little) / (big + little)
        low, high = 1 - rest, 1 + rest
    return x


def forward(weight: Tensor, turns: Tensor) -> Tensor:
    """`OFTModule.forward` as a weight: a linear layer's inputs are turned, or a convolution's weight is."""
    turns = turns.mT if weight.dim() == 2 else turns
    blocks = weight.double().reshape(weight.shape[0], -1, SIZE)
    return torch.einsum("ork,rkc->orc", blocks, turns).reshape(weight.shape)


def check(folder: Path, name: str, slots: dict[str, Tensor], expected: Tensor) -> None:
    engine = LoraEngine({"unet": small()})
    tensors = {f"{NAMES[name]}.{suffix}": tensor for suffix, tensor in slots.items()}
    file = bind(engine, folder, tensors)
    assert file.unused == ()
    weight = small().get_submodule(name).weight
    (layer,) = file.layers
    assert relative_error(layer.algorithm.delta(weight), expected - weight.double()) < 1e-4


def vectors_of(name: str, size: float = 0.2) -> Tensor:
    count = small().get_submodule(name).weight[0].numel() // SIZE
    return size * randn(count, SIZE * (SIZE - 1) // 2, seed=3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["log", "multiplier", "norms saved", "norms not saved"])
def test_dora_over_oft_multiplies_the_outputs(tmp_path: Path, name: str, kind: str) -> None:
    """Pull request 1335: its last form, and the two before it."""
    weight, vectors = small().get_submodule(name).weight, vectors_of(name)
    turned = forward(weight, series(skew_of(vectors)))
    rows = [-1] + [1] * (weight.dim() - 1)
    given = 1 + 0.3 * randn(weight.shape[0], seed=7)
    norms = weight.double().flatten(1).norm(dim=1)
    slots, factors = {
        "log": ({"dora_log_multiplier": given}, given.double().exp()),
        "multiplier": ({"dora_multiplier": given}, given.double()),
        "norms saved": (
            {"dora_scale": given.reshape(rows), "initial_norm": torch.full_like(given, 3.0)},
            given.double() / 3,
        ),
        "norms not saved": ({"dora_scale": given.reshape(rows)}, given.double() / norms),
    }[kind]
    expected = turned * factors.reshape(rows)
    check(tmp_path, name, {"oft_R.weight": vectors, **slots}, expected.detach())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limit", [0.3, 0.95, 1.5])
def test_clipped_oft_holds_the_spectral_norm(tmp_path: Path, name: str, limit: float) -> None:
    vectors = vectors_of(name, 0.6)
    skew = skew_of(vectors)
    assert (torch.linalg.matrix_norm(skew, ord=2) > 0.95).any()
    expected = forward(small().get_submodule(name).weight, series(clipped(skew, limit)))
    slots = {"oft_R.weight": vectors, "oft_R.clipped_oft": torch.tensor(limit)}
    check(tmp_path, name, slots, expected.detach())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0.01, 0.2, 0.8])
def test_cans_oft_is_the_exact_transform(tmp_path: Path, name: str, size: float) -> None:
    vectors = vectors_of(name, size)
    expected = forward(small().get_submodule(name).weight, iterated(skew_of(vectors)))
    slots = {"oft_R.weight": vectors, "oft_R.cans_oft": torch.tensor(True)}
    check(tmp_path, name, slots, expected.detach())


def test_all_of_it_at_once(tmp_path: Path) -> None:
    """In the order of OneTrainer's preview: scaled, clipped, transformed, multiplied."""
    vectors, given = vectors_of("linear", 2.0), 0.2 * randn(8, seed=7)
    skew = clipped(skew_of(vectors / (2 * (SIZE - 1) ** 0.5)), 0.5)
    turned = forward(small().linear.weight, iterated(skew))
    flags = {"scaled_oft": torch.tensor(True), "cans_oft": torch.tensor(1.0)}
    flags |= {"clipped_oft": torch.tensor(0.5, dtype=torch.bfloat16)}
    slots = {"oft_R.weight": vectors, **{f"oft_R.{name}": flag for name, flag in flags.items()}}
    slots["dora_log_multiplier"] = given
    check(tmp_path, "linear", slots, (turned * given.double().exp()[:, None]).detach())


@pytest.mark.parametrize(
    ("prefix", "slots", "word"),
    [
        ("unet.", {"oft_R.weight": (3, 6), "dora_scale": (8, 1)}, "as OneTrainer writes it"),
        ("lora_unet_", {"oft_R.weight": (3, 6), "magnitude": (8,)}, "as OneTrainer writes it"),
        ("lora_unet_", {"oft_blocks": (2, 4, 4), "dora_scale": (8, 1)}, "DoRA over LyCORIS' OFT"),
        (
            "lora_unet_",
            {"oft_blocks": (2, 2, 2, 2), "dora_scale": (8, 1)},
            "DoRA over LyCORIS' OFT",
        ),
        ("lora_unet_", {"oft_R.weight": (3, 6), "initial_norm": (8, 1)}, "do not fit together"),
        (
            "lora_unet_",
            {"oft_R.weight": (3, 6), "dora_multiplier": (8,), "dora_scale": (8,)},
            "do not fit together",
        ),
        ("lora_unet_", {"oft_R.weight": (3, 6), "dora_multiplier": (7,)}, "factors [7]"),
    ],
    ids=str,
)
def test_what_nobody_writes_is_refused_by_name(
    tmp_path: Path, prefix: str, slots: dict[str, tuple[int, ...]], word: str
) -> None:
    tensors = {f"{prefix}linear.{name}": randn(*shape) for name, shape in slots.items()}
    with pytest.raises((LoraUnsupported, LoraIncompatible)) as caught:
        bind(LoraEngine({"unet": small()}), tmp_path, tensors)
    assert word in caught.value.sentence


def test_the_saved_norms_of_another_size_do_not_fit() -> None:
    part = PeftOFT(randn(3, 6), dora_scale=torch.ones(8), initial_norm=torch.ones(9))
    assert "factors [9]" in (part.misfit((8, 12)) or "")


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_a_clip_to_nothing_is_a_fault_of_the_file(limit: float) -> None:
    part = PeftOFT(randn(3, 6), clipped_oft=torch.tensor(limit))
    assert "clipped_oft" in (part.misfit((8, 12)) or "")
