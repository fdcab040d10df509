import numpy as np
import pytest
import torch
from torch import Tensor

from lora.formats.algorithms.oft import OFT
from lora.formats.algorithms.peft_oft import PeftOFT
from tests.adapters import randn
from tests.lora.checks import assert_delta, assert_misfits_are_told

LINEAR, CONV = (8, 6), (8, 6, 3, 3)


def cayley(skew: np.ndarray) -> np.ndarray:
    one = np.eye(len(skew))
    return (one + skew) @ np.linalg.inv(one - skew)


def block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    size = sum(len(block) for block in blocks)
    whole, place = np.zeros((size, size)), 0
    for block in blocks:
        whole[place : place + len(block), place : place + len(block)] = block
        place += len(block)
    return whole


def skews(blocks: Tensor, limit: float) -> np.ndarray:
    wide = blocks.double().numpy()
    skew = wide - np.swapaxes(wide, -1, -2)
    norm = np.sqrt((skew**2).sum())
    return skew * (limit / norm) if 0 < limit < norm else skew


def turned(matrix: np.ndarray, weight: Tensor, rescale: Tensor | None) -> Tensor:
    rows = matrix @ weight.double().flatten(1).numpy()
    if rescale is not None:
        rows = np.diag(rescale.double().flatten().numpy()) @ rows
    return torch.from_numpy(rows).reshape(weight.shape)


def butterfly(stage: int, size: int, count: int) -> np.ndarray:
    """P with (P w)[new] = w[old]: rows that lie 2^stage half blocks apart come to lie side by side."""
    total, stride = size * count, 2**stage * (size // 2)
    order = [
        group * 2 * stride + side * stride + place
        for group in range(total // (2 * stride))
        for place in range(stride)
        for side in range(2)
    ]
    return np.eye(total)[order]


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.01, 100.0])
@pytest.mark.parametrize("shape", [LINEAR, CONV], ids=["linear", "conv"])
def test_oft_turns_blocks_of_output_rows(
    shape: tuple[int, ...], alpha: float | None, rescaled: bool
) -> None:
    blocks, weight = 0.3 * randn(2, 4, 4, seed=1), randn(*shape, seed=2)
    rescale = randn(8, *(1 for _ in shape[1:]), seed=3) if rescaled else None
    part = OFT(blocks, rescale, None if alpha is None else torch.tensor(alpha))
    # einsum("k n m, k n i -> k m i"): every block multiplies from the left, transposed.
    rotation = block_diagonal([cayley(skew).T for skew in skews(blocks, (alpha or 0.0) * 8)])
    assert_delta(part, weight, turned(rotation, weight, rescale))
    assert (part.name, part.rank) == ("oft", 4)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.02, 100.0])
@pytest.mark.parametrize(("stages", "count", "size"), [(1, 4, 2), (2, 4, 2), (3, 4, 2), (2, 2, 4)])
def test_boft_turns_shuffled_rows_stage_by_stage(
    stages: int, count: int, size: int, alpha: float | None, rescaled: bool
) -> None:
    blocks, weight = 0.3 * randn(stages, count, size, size, seed=1), randn(*CONV, seed=2)
    rescale = randn(8, 1, 1, 1, seed=3) if rescaled else None
    part = OFT(blocks, rescale, None if alpha is None else torch.tensor(alpha))
    rotation = np.eye(8)
    for stage, skew in enumerate(skews(blocks, (alpha or 0.0) * 8)):
        shuffle = butterfly(stage, size, count)
        rotation = shuffle.T @ block_diagonal([cayley(s) for s in skew]) @ shuffle @ rotation
    assert_delta(part, weight, turned(rotation, weight, rescale))
    assert (part.name, part.rank) == ("boft", size)


def test_misfit_of_too_many_stages_and_of_odd_blocks() -> None:
    assert "butterfly" in (OFT(randn(4, 4, 2, 2)).misfit(LINEAR) or "")
    assert "butterfly" in (OFT(randn(1, 3, 3, 3)).misfit((9, 2)) or "")
    assert "square" in (OFT(randn(2, 4, 3)).misfit(LINEAR) or "")
    assert "rescale" in (OFT(randn(2, 4, 4), randn(7, 1)).misfit(LINEAR) or "")


def triangle(values: Tensor, size: int) -> np.ndarray:
    skew, left = np.zeros((size, size)), iter(values.double().tolist())
    for row in range(size):
        for column in range(row + 1, size):
            skew[row, column] = next(left)
    return skew - skew.T


def peft_rotation(skew: np.ndarray, terms: int | None) -> np.ndarray:
    one = np.eye(len(skew))
    if terms == 0:
        return (one - skew) @ np.linalg.inv(one + skew)
    # PEFT's series: I, then twice each power, the last power once.
    factors = {1: [1], 2: [1, 2], 3: [1, 2, 2, 1], 4: [1, 2, 2, 1], 5: [1, 2, 2, 2, 1]}
    factors |= {6: [1, 2, 2, 2, 2, 1]}
    series = factors[5 if terms is None else terms]
    return sum(f * np.linalg.matrix_power(skew, n) for n, f in enumerate(series))


@pytest.mark.parametrize("terms", [None, 0, 1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [LINEAR, (4, 6, 1, 1), (4, 2, 3, 3)], ids=str)
def test_peft_turns_blocks_of_inputs(
    shape: tuple[int, ...], shared: bool, terms: int | None
) -> None:
    inputs = int(np.prod(shape[1:]))
    values = 0.2 * randn(1 if shared else inputs // 3, 3, seed=1)
    weight = randn(*shape, seed=2)
    part = PeftOFT(values, None if terms is None else torch.tensor(terms))
    blocks = [peft_rotation(triangle(row, 3), terms) for row in values]
    rotation = block_diagonal(blocks * (inputs // 3) if shared else blocks)
    merged = torch.from_numpy(weight.double().flatten(1).numpy() @ rotation.T)
    if terms == 1:
        assert torch.equal(part.delta(weight), torch.zeros(shape))
    else:
        assert_delta(part, weight, merged.reshape(shape))
    assert part.rank == 3


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        (OFT(randn(2, 4, 4), randn(8, 1)), LINEAR),
        (OFT(randn(2, 4, 4), randn(8, 1, 1, 1)), CONV),
        (OFT(randn(2, 4, 2, 2), randn(8, 1)), LINEAR),
        (PeftOFT(randn(2, 3)), LINEAR),
        (PeftOFT(randn(1, 3)), CONV),
    ],
    ids=["oft", "oft conv", "boft", "peft", "peft shared"],
)
def test_misfits_are_told(part: OFT | PeftOFT, shape: tuple[int, ...]) -> None:
    assert_misfits_are_told(part, shape)


def test_misfits_of_peft_name_the_shapes() -> None:
    assert "upper triangles" in (PeftOFT(randn(2, 4)).misfit(LINEAR) or "")
    assert "inputs" in (PeftOFT(randn(1, 10)).misfit(LINEAR) or "")
