"""PEFT's configs: which number a layer gets, and patterns that a stranger wrote."""

import json
from typing import Any

import peft
import pytest
import torch

from lora.errors import LoraCorrupt, LoraUnsupported
from lora.formats.alphas import Alphas
from tests.adapters import randn


def alpha_of(config: dict[str, Any], name: str = "base_model.model.a.to_q") -> float | None:
    slots = {"lora_down": randn(4, 8), "lora_up": randn(8, 4)}
    Alphas.of({}, json.dumps(config)).complete(slots, "unet", name)
    return float(slots["alpha"]) if "alpha" in slots else None


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ({}, 8),  # PEFT's default, as of the next two
        ({"r": 4, "lora_alpha": None}, 8),
        ({"r": 4, "use_rslora": True}, 16),
        ({"lora_alpha": 8}, 8),
        ({"lora_alpha": 8, "use_rslora": True}, 16),
        ({"alpha": 3}, 3),
        ({"lora_alpha": None, "alpha": 3}, 3),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": 2}}, 2),
        ({"lora_alpha": 8, "alpha_pattern": {"o_q": 2}}, 8),
        ({"lora_alpha": 8, "alpha_pattern": {"^a.to_q": 2}}, 2),
        ({"lora_alpha": 8, "alpha_pattern": {"^to_q": 2}}, 8),
        ({"lora_alpha": 8, "alpha_pattern": {".*_q": 3, "to_q": 2}}, 3),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": 2, ".*_q": 3}}, 2),
        ({"lora_alpha": 8, "alpha_pattern": {"to_(q|k)": 5}}, 5),
        ({"lora_alpha": 8, "alpha_pattern": {r"[ab]\.to_\w+": 6}}, 6),
    ],
)
def test_a_layers_alpha_is_pefts(config: dict[str, Any], alpha: float | None) -> None:
    assert alpha_of(config) == alpha


def test_a_networks_own_file_names_no_component() -> None:
    fields = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"]).to_dict()
    told = {"lora_adapter_metadata": json.dumps(fields, default=sorted)}
    slots = {"lora_down": randn(4, 8), "lora_up": randn(8, 4)}
    Alphas.of(told).complete(slots, "unet", "a.to_q")
    assert float(slots["alpha"]) == 6


def test_pefts_default_rank_counts_for_whole_factors() -> None:
    slots = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 2)}
    Alphas.of({}, '{"peft_type": "LOKR", "alpha": 16}').complete(slots, "unet", "a")
    assert torch.equal(slots["lokr_w1"], torch.full((2, 2), 2.0))


@pytest.mark.parametrize("slots", [{"magnitude"}, {"dora_scale"}, set()])
def test_a_dora_without_its_magnitudes_is_no_lora(slots: set[str]) -> None:
    tensors = {name: randn(8) for name in slots} | {
        "lora_up": randn(8, 4),
        "lora_down": randn(4, 8),
    }
    reason = Alphas.of({}, '{"use_dora": true}').complete(tensors, "unet", "a")
    assert (reason is None) is bool(slots)
    assert "magnitudes are missing" in (reason or "magnitudes are missing")


def test_a_files_own_alpha_goes_before_the_config() -> None:
    slots = {"lora_down": randn(4, 8), "alpha": torch.tensor(1.0)}
    Alphas.of({}, '{"lora_alpha": 8}').complete(slots, "unet", "a")
    assert float(slots["alpha"]) == 1


def test_diffusers_metadata_has_one_config_per_component() -> None:
    fields = {
        "unet.lora_alpha": 4,
        "unet.alpha_pattern": {"^a.to_q": 8},
        "text_encoder.lora_alpha": 2,
    }
    alphas = Alphas.of({"lora_adapter_metadata": json.dumps(fields)})
    for component, name, expected in (
        ("unet", "unet.a.to_q", 8.0),
        ("unet", "unet.b.to_q", 4.0),
        ("text_encoder", "text_encoder.a.to_q", 2.0),
    ):
        slots = {"lora_down": randn(4, 8)}
        alphas.complete(slots, component, name)
        assert float(slots["alpha"]) == expected


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(..|.)" * 20 + "Z", ".*" * 30, "a{99999999999}", "(?=x)", "x" * 1000 + "*"],
)
def test_patterns_that_could_take_for_ever_are_refused(pattern: str) -> None:
    with pytest.raises(LoraUnsupported):
        alpha_of({"lora_alpha": 8, "alpha_pattern": {pattern: 1}}, "a." * 100 + "to_q")


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        "{",
        '{"lora_alpha": "x"}',
        '{"lora_alpha": 1e400}',
        '{"alpha_pattern": 3}',
        '{"alpha_pattern": {"(": 1}}',
        '{"r": [1]}',
        '{"feedforward_modules": 3}',
        '{"num_cayley_neumann_terms": -1}',
    ],
)
def test_what_peft_would_not_write_is_corrupt(config: str) -> None:
    with pytest.raises(LoraCorrupt) as caught:
        Alphas.of({}, config)
    assert "adapter_config.json is malformed" in str(caught.value)
