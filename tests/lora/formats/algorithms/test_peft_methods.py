"""PEFT's further methods against PEFT itself: saved by it, read by us, and compared with its own merge."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora.engine.engine import LoraEngine
from lora.engine.stack import LoraUse, Mode
from lora.errors import LoraUnsupported
from lora.formats.adapter import LoraFile, load
from lora.formats.algorithms.adalora import AdaLoRA
from lora.formats.algorithms.hra import HRA
from lora.formats.algorithms.miss import MiSS
from lora.formats.algorithms.peft_boft import PeftBOFT
from lora.formats.algorithms.randlora import RandLoRA
from tests.adapters import randn
from tests.lora.checks import relative_error
from tests.lora.small import Small, small

LINEAR, BOTH = ["linear", "plain"], ["linear", "conv"]
METHODS: Mapping[str, Any] = {
    "hra": peft.HRAConfig(r=4, target_modules=BOTH),
    "hra, odd": peft.HRAConfig(r=3, target_modules=BOTH, init_weights=False),
    "hra, orthogonal": peft.HRAConfig(r=4, target_modules=BOTH, apply_GS=True),
    "miss": peft.MissConfig(r=4, target_modules=LINEAR),
    "miss, not a divisor": peft.MissConfig(r=5, target_modules=LINEAR),
    "miss, mini": peft.MissConfig(r=4, mini_r=2, target_modules=LINEAR, init_weights="mini"),
    "miss, bat": peft.MissConfig(r=2, target_modules=LINEAR, init_weights="bat"),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=BOTH),
    "boft, by number": peft.BOFTConfig(
        boft_block_size=0, boft_block_num=2, target_modules=LINEAR, bias="boft_only"
    ),
    "boft, two stages": peft.BOFTConfig(
        boft_block_size=2, boft_n_butterfly_factor=2, target_modules=BOTH
    ),
    "boft, three stages, by number": peft.BOFTConfig(
        boft_block_size=0,
        boft_block_num=4,
        boft_n_butterfly_factor=3,
        target_modules=["plain", "point"],
    ),
    "randlora": peft.RandLoraConfig(r=4, randlora_alpha=6, target_modules=LINEAR),
    "randlora, not a divisor": peft.RandLoraConfig(
        r=3, target_modules=LINEAR, bias="randlora_only"
    ),
    "randlora, sparse": peft.RandLoraConfig(
        r=3, randlora_alpha=2, target_modules=LINEAR, sparse=True
    ),
    "randlora, very sparse": peft.RandLoraConfig(
        r=2, randlora_alpha=1, target_modules=LINEAR, very_sparse=True, projection_prng_key=7
    ),
    "adalora": peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, lora_alpha=6, target_modules=LINEAR
    ),
}


def saved(folder: Path, config: Any) -> Small:
    """What PEFT makes of a model with a trained adapter that it has saved to the folder."""
    model = peft.get_peft_model(copy.deepcopy(small()), copy.deepcopy(config))
    for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.2 * randn(*parameter.shape, seed=900 + index)
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(small(), folder).eval().merge_and_unload()


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT has several stages only where it can compile its extension, which puts blocks on a diagonal."""

    def on_diagonals(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*stage) for stage in blocks])]

    extension = SimpleNamespace(forward=on_diagonals)
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: extension)


def read(folder: Path, engine: LoraEngine, *, config: bool = True) -> LoraFile:
    text = (folder / "adapter_config.json").read_text()
    path = folder / "adapter_model.safetensors"
    return load(path, engine.key_map, "x", config=text if config else None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", [Mode.MERGED, Mode.DYNAMIC])
def test_the_weights_are_those_of_pefts_own_merge(tmp_path: Path, method: str, mode: Mode) -> None:
    expected = saved(tmp_path, METHODS[method])
    root = small()
    engine = LoraEngine({"unet": root})
    file = read(tmp_path, engine)
    assert file.unused == ()
    assert file.algorithms[0] == method.partition(",")[0]
    before = {name: p.detach().clone() for name, p in root.named_parameters()}
    changed = 0
    with torch.no_grad(), engine.applied([LoraUse(file, 1.0)], mode):
        for name, shape in Small.INPUTS.items():
            x = randn(*shape, seed=len(name))
            mine, theirs = (_layer(model, name)(x) for model in (root, expected))
            base = _layer(small(), name)(x)
            changed += not torch.equal(theirs, base)
            if torch.equal(theirs, base):
                assert torch.equal(mine, base)
            else:
                assert relative_error(mine - base, theirs - base) < 1e-4
    assert changed == 2
    assert all(torch.equal(p, before[name]) for name, p in root.named_parameters())


def _layer(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


@pytest.mark.parametrize(
    ("method", "name"), [("hra", "HRA"), ("adalora", "AdaLoRA"), ("randlora", "RandLora")]
)
def test_what_only_the_config_tells_is_not_guessed(tmp_path: Path, method: str, name: str) -> None:
    saved(tmp_path, METHODS[method])
    with pytest.raises(LoraUnsupported) as caught:
        read(tmp_path, LoraEngine({"unet": small()}), config=False)
    assert f"{name} can only be read with PEFT's adapter_config.json" in caught.value.sentence


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore:Specified to not save basis_A", "ignore:Found missing adapter")
def test_randloras_bases_are_not_guessed_and_the_hint_brings_them_back(tmp_path: Path) -> None:
    config = peft.RandLoraConfig(r=4, target_modules=LINEAR, save_projection=False)
    expected = saved(tmp_path, config)
    engine = LoraEngine({"unet": small()})
    with pytest.raises(LoraUnsupported) as caught:
        read(tmp_path, engine)
    assert "lacks RandLora's random bases" in caught.value.sentence
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"save_projection": false', '"save_projection": true'))
    peft.PeftModel.from_pretrained(small(), tmp_path).save_pretrained(tmp_path)
    file = read(tmp_path, engine)
    (linear,) = (one for one in file.layers if one.target.path == "linear")
    weight = small().linear.weight
    change = expected.linear.weight - weight
    assert relative_error(linear.algorithm.delta(weight), change) < 1e-4


@pytest.mark.parametrize("whose", ["base_model.randlora", "base_model.model."])
def test_randloras_bases_may_be_saved_once(tmp_path: Path, whose: str) -> None:
    """Shared alone, or with the modules alone."""
    saved(tmp_path, METHODS["randlora"])
    engine = LoraEngine({"unet": small()})
    before = read(tmp_path, engine)

    def keep(tensors: dict[str, Tensor]) -> None:
        for key in [k for k in tensors if k.endswith(("randlora_A", "randlora_B"))]:
            if not key.startswith(whose):
                del tensors[key]

    rewritten(tmp_path, keep)
    after = read(tmp_path, engine)
    assert after.unused == ()
    assert after.keys < before.keys
    for one, other in zip(before.layers, after.layers, strict=True):
        weight = randn(*one.target.parameters["weight"])
        assert torch.equal(one.algorithm.delta(weight), other.algorithm.delta(weight))


def test_randloras_bases_that_differ_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, METHODS["randlora"])
    rewritten(tmp_path, lambda tensors: tensors["base_model.randlora_B"].mul_(2))
    with pytest.raises(LoraUnsupported) as caught:
        read(tmp_path, LoraEngine({"unet": small()}))
    assert "different RandLora bases" in caught.value.sentence


def test_bases_of_no_layer_are_told(tmp_path: Path) -> None:
    saved(tmp_path, METHODS["miss"])
    rewritten(tmp_path, lambda tensors: tensors.update({"base_model.randlora_A": torch.ones(2)}))
    (one,) = read(tmp_path, LoraEngine({"unet": small()})).unused
    assert one.reason == "no layer of the file uses it"


def test_a_vector_of_zeros_reflects_nothing() -> None:
    vectors = torch.zeros(12, 2)
    assert not HRA(vectors).delta(randn(8, 12)).any()


@pytest.mark.parametrize(
    ("algorithm", "shape", "word"),
    [
        (HRA(randn(12, 2)), (8, 13), "hra_u"),
        (HRA(randn(12)), (8, 12), "hra_u"),
        (MiSS(randn(4, 8)), (9, 12), "miss_block"),
        (MiSS(randn(13, 8)), (8, 12), "miss_block"),
        (MiSS(randn(2, 4, 4)), (8, 10), "miss_block"),
        (MiSS(randn(4, 8)), (8, 4, 3, 3), "miss_block"),
        (PeftBOFT(randn(1, 3, 4, 4), randn(8, 1)), (8, 13), "boft_R"),
        (PeftBOFT(randn(2, 3, 4, 4), randn(8, 1)), (8, 12), "no butterfly"),
        (PeftBOFT(randn(2, 4, 3, 3), randn(8, 1)), (8, 12), "no butterfly"),
        (RandLoRA(randn(2, 4), randn(4, 8), randn(2, 8), randn(12, 4, 2)), (8, 12), "other axes"),
        (RandLoRA(randn(2, 4), randn(3, 8), randn(2, 1, 8), randn(12, 4, 2)), (8, 12), "fit to"),
        (RandLoRA(randn(2, 4), randn(4, 8), randn(2, 1, 8), randn(12, 4, 3)), (8, 12), "fit to"),
        (RandLoRA(randn(2, 4), randn(4, 8), randn(2, 1, 8), randn(11, 4, 2)), (8, 12), "bases"),
        (RandLoRA(randn(2, 4), randn(4, 8), randn(2, 1, 7), randn(12, 4, 2)), (8, 12), "bases"),
        (RandLoRA(randn(2, 4), randn(4, 8), randn(2, 1, 8), randn(12, 4, 2)), (9, 12), "gamma"),
        (PeftBOFT(randn(1, 3, 4, 5), randn(8, 1)), (8, 12), "no square blocks"),
        (PeftBOFT(randn(1, 3, 4, 4), randn(9, 1)), (8, 12), "boft_s"),
        (AdaLoRA(randn(2, 12), randn(8, 2), randn(2, 1)), (8, 13), "do not fit the layer"),
        (AdaLoRA(randn(2, 12), randn(8, 2), randn(3, 1)), (8, 12), "do not fit together"),
    ],
    ids=str,
)
def test_misfits_are_told(algorithm: Any, shape: tuple[int, ...], word: str) -> None:
    assert word in (algorithm.misfit(shape) or "")


def test_a_block_may_be_of_a_narrow_type() -> None:
    block: Tensor = randn(2, 4).half()
    change = MiSS(block).delta(randn(8, 6))
    assert torch.equal(change[5, 3], block[1, 1].float())
