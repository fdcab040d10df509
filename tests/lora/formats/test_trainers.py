"""One suffix, several trainers' meanings: told by metadata, names and prefixes, or refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lora.formats.algorithms.oft import OFT
from lora.formats.algorithms.peft_oft import PeftOFT
from lora.formats.trainers import settle
from tests.adapters import randn

LINEAR, CONV = (8, 12), (8, 4, 3, 3)
TOLD = {"ot_branch": "master"}


def settled(
    slots: dict[str, Tensor],
    stem: str,
    shape: tuple[int, ...],
    about: dict[str, str] | None = None,
    *,
    has_config: bool = False,
) -> tuple[dict[str, Tensor], str | None]:
    slots, keys = dict(slots), {slot: f"{stem}.{slot}" for slot in slots}
    reason = settle(slots, keys, stem, shape, about or {}, has_config=has_config)
    return slots, reason


def rotations(vectors: Tensor, size: int) -> Tensor:
    """The transform's series of five terms, written out."""
    skew = torch.zeros(len(vectors), size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    skew[:, rows, columns] = vectors.double()
    skew = skew - skew.transpose(1, 2)
    square = skew @ skew
    one = torch.eye(size, dtype=torch.float64)
    return one + 2 * skew + 2 * square + 2 * square @ skew + square @ square


def turned(weight: Tensor, turns: Tensor, size: int) -> Tensor:
    """Each block of inputs times a matrix: PEFT's R^T, or OneTrainer's R for convolutions."""
    blocks = weight.double().reshape(weight.shape[0], -1, size)
    return torch.einsum("ork,rkc->orc", blocks, turns).reshape(weight.shape).float()


@pytest.mark.parametrize("shape", [LINEAR, CONV])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("stem", "about"),
    [
        ("lora_unet_a_b", {}),
        ("lora_unet_a_b", TOLD),
        ("unet.a.b", TOLD),
        ("diffusion_model.a.b", TOLD),
    ],
)
def test_onetrainers_oft_is_turned_as_its_own_forward_does(
    shape: tuple[int, ...], scaled: bool, stem: str, about: dict[str, str]
) -> None:
    weight, vectors = randn(*shape), 0.1 * randn(math.prod(shape[1:]) // 4, 6)
    flag = {"scaled_oft": torch.tensor(True)} if scaled else {}
    slots, reason = settled({"oft_r": vectors, **flag}, stem, shape, about)
    assert reason is None
    turns = rotations(vectors / (2 * math.sqrt(3) if scaled else 1), 4)
    turns = turns if len(shape) > 2 else turns.transpose(1, 2)
    expected = turned(weight, turns, 4) - weight
    torch.testing.assert_close(PeftOFT(**slots).delta(weight), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "flag", [torch.tensor(1.0), torch.tensor(1, dtype=torch.bfloat16), torch.tensor([1])]
)
def test_the_flag_of_scaled_oft_may_be_cast(flag: Tensor) -> None:
    slots, _ = settled({"oft_r": torch.ones(3, 6), "scaled_oft": flag}, "lora_unet_a", LINEAR)
    expected = torch.full((3, 6), 1 / (2 * math.sqrt(3)))
    torch.testing.assert_close(PeftOFT(**slots).plain(), expected)


def test_a_flag_of_no_is_no_scale() -> None:
    slots, _ = settled({"oft_r": torch.ones(3, 6), "scaled_oft": torch.tensor(False)}, "a", LINEAR)
    assert torch.equal(PeftOFT(**slots).plain(), torch.ones(3, 6))


@pytest.mark.parametrize(("stem", "has_config"), [("base_model.model.a", False), ("unet.a", True)])
def test_pefts_oft_stays_as_it_is(stem: str, has_config: bool) -> None:
    vectors = randn(9, 6)
    slots, reason = settled({"oft_r": vectors}, stem, CONV, has_config=has_config)
    assert reason is None
    assert torch.equal(slots["oft_r"], vectors)


@pytest.mark.parametrize("stem", ["unet.a.b", "diffusion_model.a.b", "a.b"])
def test_a_turned_convolution_of_nobody_is_refused(stem: str) -> None:
    _, reason = settled({"oft_r": randn(9, 6)}, stem, CONV)
    assert reason is not None
    assert "OneTrainer and PEFT turn" in reason
    assert settled({"oft_r": randn(3, 6)}, stem, LINEAR)[1] is None


@pytest.mark.parametrize(
    ("stem", "limit"), [("diffusion_model.a.b", 1.0), ("lora_unet_a_b", 8.0), ("oft_unet_a_b", 8.0)]
)
def test_comfyuis_constraint_is_the_norms_limit_itself(stem: str, limit: float) -> None:
    blocks, weight = randn(2, 4, 4), randn(8, 6)
    slots, _ = settled({"oft_blocks": blocks, "alpha": torch.tensor(1.0)}, stem, (8, 6))
    skew = (blocks - blocks.transpose(1, 2)).double()
    skew = skew * min(1.0, limit / float(skew.norm()))
    one = torch.eye(4, dtype=torch.float64)
    turn = (one + skew) @ torch.linalg.inv(one - skew)
    expected = torch.einsum("knm,kni->kmi", turn, weight.double().reshape(2, 4, 6)).reshape(8, 6)
    torch.testing.assert_close(
        OFT(**slots).delta(weight), (expected - weight).float(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (8, 6, 1, 1), (8, 4, 2, 3, 3)])
def test_a_flat_kernel_gets_its_axes(shape: tuple[int, ...]) -> None:
    down = randn(2, math.prod(shape[1:]))
    slots, _ = settled({"lora_down": down, "lora_up": randn(8, 2)}, "diffusion_model.a", shape)
    assert torch.equal(slots["lora_down"], down.reshape(2, *shape[1:]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("rows", [False, True])
def test_stored_steps_are_multiplied(dtype: torch.dtype, rows: bool) -> None:
    numbers = torch.tensor([[1, -2, 3], [4, 5, -6]]).to(dtype)
    step = torch.tensor([0.5, 0.25]) if rows else torch.tensor(0.5)
    slots, _ = settled({"lora_down": numbers, "lora_down.step": step}, "a", LINEAR)
    expected = numbers.float() * (step[:, None] if rows else step)
    assert slots.keys() == {"lora_down"}
    assert torch.equal(slots["lora_down"], expected)


def test_a_step_of_another_size_stays() -> None:
    given = {"lora_down": torch.ones(2, 3, dtype=torch.int8), "lora_down.step": torch.ones(3)}
    assert settled(given, "a", LINEAR)[0].keys() == given.keys()


def test_a_shape_that_the_layer_has_already_is_no_change() -> None:
    own = {"reshape_weight": torch.tensor([8, 12])}
    assert settled(own, "a", LINEAR)[0] == {}
    assert settled(own, "a", (8, 13))[0].keys() == own.keys()
