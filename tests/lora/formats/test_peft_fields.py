"""Of every field of PEFT's configs it is known whether it changes the result."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import peft
import pytest

from lora.errors import LoraUnsupported
from lora.formats.alphas import Alphas
from lora.formats.peft_fields import READ, SHOWN, TRAINING, TYPES
from tests.adapters import randn

CONFIGS = (
    *(peft.LoraConfig, peft.LoHaConfig, peft.LoKrConfig, peft.OFTConfig, peft.IA3Config),
    *(peft.LNTuningConfig, peft.HRAConfig, peft.MissConfig, peft.BOFTConfig, peft.RandLoraConfig),
)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_with_its_defaults_is_read(config: Any) -> None:
    fields = config(target_modules=["to_q"]).to_dict()
    Alphas.of({}, json.dumps(fields, default=sorted))
    known = READ | SHOWN | TRAINING | {"init_lora_weights"}
    unknown = {field.name for field in dataclasses.fields(config)} - known
    assert not any(fields[name] for name in unknown)


def test_adaloras_schedule_is_no_matter() -> None:
    fields = peft.AdaLoraConfig(target_modules=["to_q"], total_step=10, init_r=4).to_dict()
    fields["rank_pattern"] = {"to_q.lora_E": [True, False]}
    config = Alphas.of({}, json.dumps(fields, default=sorted)).configs[""]
    assert config.ada_scaling == pytest.approx(8 / 4, rel=1e-4)
    with pytest.raises(LoraUnsupported):
        Alphas.of({}, json.dumps({"peft_type": "ADALORA", "lora_alpha": 0}))


@pytest.mark.parametrize(
    "fields",
    [
        *({"init_lora_weights": kind} for kind in ("pissa", "pissa_niter_4", "olora", "corda")),
        *({"init_lora_weights": kind} for kind in ("loftq", "lora_ga", "something_new")),
        {"use_qalora": True},
        {"alora_invocation_tokens": [1, 2]},
        {"layer_replication": [[0, 4], [2, 5]]},
        {"target_parameters": ["a.weight"]},
        {"kasa_config": {"beta": 1}},
        {"use_bdlora": {"a": 1}},
        {"arrow_config": {"top_k": 3}},
        {"a_field_of_tomorrow": 3},
        *({"peft_type": kind} for kind in ("VERA", "C3A", "SHIRA", "TOMORROW")),
    ],
    ids=str,
)
def test_a_field_that_is_not_implemented_is_refused_with_its_name(fields: dict[str, Any]) -> None:
    (name,) = fields
    for about in ({}, {"lora_adapter_metadata": json.dumps({f"unet.{name}": fields[name]})}):
        with pytest.raises(LoraUnsupported) as caught:
            Alphas.of(about, None if about else json.dumps(fields))
        assert (fields[name] if name == "peft_type" else name) in caught.value.sentence
        assert caught.value.hint


@pytest.mark.parametrize("kind", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_first_values_that_leave_the_base_alone_are_read(kind: object) -> None:
    Alphas.of({}, json.dumps({"init_lora_weights": kind, "a_field_of_tomorrow": None}))


@pytest.mark.parametrize(
    "config", [{"lora_alpha": 0}, {"lora_alpha": 8, "alpha_pattern": {"a": 0}}]
)
@pytest.mark.parametrize("slot", ["lora_up", "hada_w1_a", "lokr_w1"])
def test_an_alpha_of_zero_is_no_change(config: dict[str, Any], slot: str) -> None:
    slots = {slot: randn(8, 4), "lora_down": randn(4, 8), "lora_up_bias": randn(8)}
    Alphas.of({}, json.dumps(config)).complete(slots, "unet", "a")
    assert not slots[slot].any()
    assert not slots["lora_up_bias"].any()
    assert "alpha" not in slots


def test_the_types_are_pefts() -> None:
    assert set(TYPES) - {None} <= {kind.value for kind in peft.PeftType}
