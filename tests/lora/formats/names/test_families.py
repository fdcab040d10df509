"""Families: told by keys and shapes first, and by a name only where the name is the family's own."""

from __future__ import annotations

import pytest

from lora.formats.header import Header, TensorInfo
from lora.formats.names.families import identify
from lora.formats.names.family import family_of


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Qwen/Qwen-Image", "Qwen-Image"),
        ("Qwen/Qwen-Image-Edit-2509", "Qwen-Image"),
        ("qwen_image", "Qwen-Image"),
        ("Qwen/Qwen2.5-7B-Instruct", None),
        ("Qwen/Qwen3-0.6B", None),
        ("Wan-AI/Wan2.1-T2V-14B", "Wan"),
        ("yentinglin/Taiwan-LLM-7B-v2.1-chat", None),
        ("someone/wander-7b", None),
        ("black-forest-labs/FLUX.1-dev", "Flux.1"),
        ("someone/influxdb-llama", None),
        ("stabilityai/stable-diffusion-xl-base-1.0", "SDXL"),
        ("stabilityai/stable-diffusion-xl-refiner-1.0", "SDXL refiner"),
        ("", None),
    ],
)
def test_a_name_tells_the_family_only_if_it_is_the_familys_own(
    name: str, family: str | None
) -> None:
    assert family_of(name) == family


@pytest.mark.parametrize("base", ["Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen-Image", ""])
def test_a_language_models_keys_go_before_any_name(base: str) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors = {key: TensorInfo("F32", (8, 64), 0, 2048)}
    header = Header(tensors, {"ss_base_model_version": base})
    assert identify(header) == "language model"
