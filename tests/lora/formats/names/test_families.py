"""Families: told by keys and shapes first, and by a name only where the name is the family's own."""

from __future__ import annotations

import pytest

from lora.formats.header import Header, TensorInfo
from lora.formats.names.families import identify
from lora.formats.names.family import claimed, family_of


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


@pytest.mark.parametrize(
    ("fields", "family"),
    [
        ({"ss_base_model_version": "sd_v1"}, "SD 1.5"),
        ({"ss_sd_model_name": "v1-5-pruned-emaonly.safetensors"}, "SD 1.5"),
        ({"ss_sd_model_name": "/models/sd_v1-5.safetensors"}, "SD 1.5"),
        ({"ss_base_model_version": "sdxl_base_v1-0", "ss_sd_model_name": "flux-1.ckpt"}, "SDXL"),
        ({"base_model": "runwayml/stable-diffusion-v1-5"}, "SD 1.5"),
        ({"base_model": "someone/flux/my-model"}, None),
        ({"baseModel": "SD 1.5"}, "SD 1.5"),
        ({"ot_config": '{"a": 1, "model_type": "STABLE_DIFFUSION_15"}'}, "SD 1.5"),
        ({"ot_config": '{"model_type":"STABLE_DIFFUSION_21_BASE"}'}, "SD 2"),
        ({"ot_config": '{"model_type": "STABLE_DIFFUSION_XL_10_BASE"}'}, "SDXL"),
        ({"ot_config": '{"model_type": "STABLE_DIFFUSION_35"}'}, "SD 3"),
        ({"ot_config": '{"model_type": "FLUX_DEV_1"}'}, "Flux.1"),
        ({"ot_config": '{"model_type": "Z_IMAGE"}'}, "Z-Image"),
        ({"ot_config": "no JSON"}, None),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-refiner/lora"}, "SDXL refiner"),
        ({}, None),
    ],
    ids=str,
)
def test_every_field_that_names_a_base_model_counts(
    fields: dict[str, str], family: str | None
) -> None:
    assert claimed(fields) == family


@pytest.mark.parametrize(
    ("path", "width", "family"),
    [
        ("transformer_blocks.3.attn1.to_q", 2048, "LTX"),
        ("transformer_blocks.3.attn1.to_q", 1920, "CogVideoX"),
        ("transformer_blocks.3.attn1.to_q", 2240, "Sana"),
        ("transformer_blocks.3.attn1.to_q", 1152, "PixArt or Sana"),
        ("transformer_blocks.3.attn1.to_q", 3072, "CogVideoX or Mochi"),
        ("transformer_blocks.3.attn1.add_k_proj", 1536, "Mochi"),
        ("blocks.3.attn1.to_q", 1408, "Hunyuan-DiT"),
        ("blocks.3.attn1.to_q", 1536, "Wan"),
        ("blocks.3.attn1.to_q", 5120, "Wan"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 1152, None),
    ],
)
@pytest.mark.parametrize("suffix", ["lora_A.weight", "oft_blocks"])
@pytest.mark.parametrize("prefix", ["transformer.", "lora_unet_"])
def test_families_that_share_names_are_told_by_their_widths(
    prefix: str, path: str, width: int, suffix: str, family: str | None
) -> None:
    flat = path.replace(".", "_") if prefix.endswith("_") else path
    shape = (4, width) if suffix == "lora_A.weight" else (width // 4, 4, 4)
    tensors = {f"{prefix}{flat}.{suffix}": TensorInfo("F32", shape, 0, 4)}
    assert identify(Header(tensors, {})) == family
