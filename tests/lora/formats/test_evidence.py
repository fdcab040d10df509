"""A file is applied because it shows what it is for; another family's evidence refuses it by its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora.engine.engine import LoraEngine
from lora.errors import LoraIncompatible, LoraUnsupported
from lora.formats.adapter import LoraFile, load
from lora.formats.header import Header, TensorInfo
from lora.formats.names.families import evidence, families_by_names, identify
from lora.formats.names.family import claimed, family_of
from lora.formats.names.others import other_kind
from lora.tools.adapters.known import sdxl_key_map
from tests.adapters import CONV_SGM, CROSS_SGM, SELF_SGM, kohya, randn, write

Tensors = Mapping[str, Tensor]


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def on_sdxl(folder: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> LoraFile:
    return load(write(folder / "a.safetensors", dict(tensors), metadata), sdxl_key_map(), "x")


def refusal(folder: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> str:
    with pytest.raises(LoraIncompatible) as caught:
        on_sdxl(folder, tensors, metadata)
    return caught.value.sentence


# --- SD 1.5: half of its layers have SDXL's names, and half of those SDXL's shapes ------------------

OLD_ATTENTION = {
    "down_blocks.0.attentions.0": 320,
    "down_blocks.1.attentions.0": 640,
    "down_blocks.2.attentions.1": 1280,
    "up_blocks.3.attentions.2": 320,
    "mid_block.attentions.0": 1280,
}


def old(
    form: str, parts: Mapping[str, tuple[int, ...]], layer: str = "attn1.to_q"
) -> dict[str, Tensor]:
    """SD 1.5's layers in a form of names; in `parts`, -1 is the layer's width, and -2 an eighth of it."""
    made = {}
    for path, width in OLD_ATTENTION.items():
        stem = form.format(f"{path}.transformer_blocks.0.{layer}")
        stem = stem.replace(".", "_") if form.endswith("_{}") else stem
        sizes = {-1: width, -2: width // 8}
        made |= {
            f"{stem}.{n}": zeros(*(sizes.get(s, s) for s in shape)) for n, shape in parts.items()
        }
    return made


LORA = {"lora_down.weight": (4, -1), "lora_up.weight": (-1, 4)}
FORMS = {
    "attn1 alone": old("lora_unet_{}", LORA),
    "lokr": old("lora_unet_{}", {"lokr_w1": (8, 8), "lokr_w2": (-2, -2)}),
    "loha": old(
        "lora_unet_{}",
        {
            **{"hada_w1_a": (-1, 2), "hada_w1_b": (2, -1)},
            **{"hada_w2_a": (-1, 2), "hada_w2_b": (2, -1)},
        },
    ),
    "oft": old("oft_unet_{}", {"oft_blocks": (8, -2, -2), "alpha": ()}),
    "ia3": old("lora_unet_{}", {"weight": (-1,), "on_input": ()}),
    "full": old("lora_unet_{}", {"diff": (-1, -1)}),
    "old processors": old(
        "unet.{}_lora",
        {"down.weight": (4, -1), "up.weight": (-1, 4)},
        "attn1.processor.to_q",
    ),
    "peft": old(
        "base_model.model.{}", {"lora_A.default.weight": (4, -1), "lora_B.default.weight": (-1, 4)}
    ),
    "lycoris": old("lycoris_{}", LORA),
    "wrapped": old("unet._orig_mod.{}", {"lora_A.weight": (4, -1), "lora_B.weight": (-1, 4)}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", ["", "sd_v1"])
def test_an_older_models_file_is_refused_in_every_layout(
    tmp_path: Path, form: str, base: str
) -> None:
    told = refusal(tmp_path, FORMS[form], {"ss_base_model_version": base})
    assert "made for SD 1.5" in told


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"ss_base_model_version": "sd_v1"}, "SD 1.5"),
        ({"ss_base_model_version": "sd_1.5"}, "SD 1.5"),
        ({"ss_v2": "True"}, "SD 2"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "SD 2"),
        ({"ss_base_model_version": "flux1"}, "Flux.1"),
        ({"ss_base_model_version": "wan2.1"}, "Wan"),
        ({"ss_base_model_version": "kolors"}, "Kolors"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-refiner/lora"}, "SDXL refiner"),
    ],
)
def test_metadata_decides_where_names_and_widths_do_not(
    tmp_path: Path, metadata: dict[str, str], name: str
) -> None:
    """The middle block's own attention has the same name and the same width in SD 1.5 and in SDXL."""
    neutral = {key: t for key, t in FORMS["attn1 alone"].items() if "mid_block" in key}
    assert on_sdxl(tmp_path, neutral).modules == 1
    assert f"made for {name}, as its metadata says" in refusal(tmp_path, neutral, metadata)


def test_facts_outweigh_wrong_metadata(tmp_path: Path) -> None:
    stem = "lora_unet_output_blocks_0_1_transformer_blocks_7_attn2_to_k"
    own = {f"{stem}.lora_down.weight": zeros(4, 2048), f"{stem}.lora_up.weight": zeros(1280, 4)}
    assert on_sdxl(tmp_path, own, {"ss_base_model_version": "sd_v1"}).modules == 1
    # Kolors has SDXL's very blocks: nothing but the metadata tells them apart.
    assert "made for Kolors" in refusal(tmp_path, own, {"ss_base_model_version": "kolors"})


@pytest.mark.parametrize(
    ("stem", "width", "name"),
    [
        ("lora_unet_double_blocks_0_img_attn_proj", 3072, "Flux.1"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", 1536, "SD 3"),
        ("transformer.single_transformer_blocks.3.attn.to_q", 3072, "Flux.1"),
        ("lora_unet_double_blocks_3_img_mlp_fc1", 3072, "HunyuanVideo"),
    ],
)
def test_a_text_encoder_that_fits_does_not_carry_another_models_file(
    tmp_path: Path, stem: str, width: int, name: str
) -> None:
    text = "lora_te1_text_model_encoder_layers_{}_self_attn_q_proj"
    tensors = {
        f"{stem}.lora_down.weight": zeros(4, width),
        f"{stem}.lora_up.weight": zeros(width, 4),
    }
    for layer in range(5):
        tensors[f"{text.format(layer)}.lora_down.weight"] = zeros(4, 768)
        tensors[f"{text.format(layer)}.lora_up.weight"] = zeros(768, 4)
    assert f"made for {name}" in refusal(tmp_path, tensors)


def test_a_drawing_part_of_nobody_is_not_carried_either(tmp_path: Path) -> None:
    text = "lora_te1_text_model_encoder_layers_{}_self_attn_q_proj"
    tensors = {"lora_unet_something_new.diff": zeros(4, 4)}
    for layer in range(5):
        tensors[f"{text.format(layer)}.lora_down.weight"] = zeros(4, 768)
        tensors[f"{text.format(layer)}.lora_up.weight"] = zeros(768, 4)
    assert "the part of the file that draws has no place" in refusal(tmp_path, tensors)
    assert on_sdxl(tmp_path, tensors, {"ss_base_model_version": "pony"}).modules == 5


def test_a_language_models_file_is_no_pictures(tmp_path: Path) -> None:
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": zeros(4, 64), f"{stem}.lora_B.weight": zeros(64, 4)}
    assert "made for a language model (" in refusal(tmp_path, tensors)


def attention(blocks: Mapping[str, int], width: int) -> dict[str, Tensor]:
    """A transformer's file of attention alone, in diffusers' names."""
    return {
        f"transformer.{name}.{n}.attn.to_q.lora_{ab}.weight": zeros(*shape)
        for name, count in blocks.items()
        for n in range(count)
        for ab, shape in (("A", (4, width)), ("B", (width, 4)))
    }


@pytest.mark.parametrize(
    ("blocks", "name"),
    [
        ({"transformer_blocks": 19, "single_transformer_blocks": 38}, "Flux.1 or Chroma"),
        ({"transformer_blocks": 20, "single_transformer_blocks": 40}, "HunyuanVideo"),
        ({"transformer_blocks": 60}, "Qwen-Image"),
    ],
)
def test_the_number_of_blocks_tells_families_of_one_width_apart(
    tmp_path: Path, blocks: dict[str, int], name: str
) -> None:
    assert f"made for {name} (" in refusal(tmp_path, attention(blocks, 3072))


def test_a_single_text_encoder_is_not_one_of_two(tmp_path: Path) -> None:
    stem = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {f"{stem}.lora_down.weight": zeros(4, 768), f"{stem}.lora_up.weight": zeros(768, 4)}
    assert "made for SD 1.5 or SD 2" in refusal(tmp_path, tensors)


def test_the_larger_part_must_find_a_module(engine: LoraEngine, tmp_path: Path) -> None:
    strange = {
        f"lora_unet_what_{n}.lora_{s}.weight": randn(4, 4) for n in range(6) for s in ("up", "down")
    }
    path = write(tmp_path / "a.safetensors", kohya() | strange)
    with pytest.raises(LoraIncompatible) as caught:
        load(path, engine.key_map, "x")
    assert (
        "the larger part of the file, 12 of its 21 tensors, has no place" in caught.value.sentence
    )
    write(path, kohya() | strange, {"ss_base_model_version": "sdxl_base_v1-0"})
    assert len(load(path, engine.key_map, "x").unused) == 12


def test_the_larger_part_must_have_the_models_shapes(engine: LoraEngine, tmp_path: Path) -> None:
    narrow = {
        f"{SELF_SGM}.lora_down.weight": randn(4, 32),
        f"{SELF_SGM}.lora_up.weight": randn(32, 4),
        f"{CONV_SGM}.lora_down.weight": randn(4, 16, 3, 3),
        f"{CONV_SGM}.lora_up.weight": randn(16, 4, 1, 1),
    }
    fits = {key: t for key, t in kohya(alpha=None).items() if key.startswith(CROSS_SGM)}
    with pytest.raises(LoraIncompatible) as caught:
        load(write(tmp_path / "a.safetensors", narrow | fits), engine.key_map, "x")
    assert "layers of other widths, and 4 of its tensors do not fit" in caught.value.sentence


# --- what is no adapter for a model ----------------------------------------------------------------


def control_lora() -> dict[str, Tensor]:
    own = {
        "input_blocks.1.0.in_layers.0.bias": randn(32),
        "input_blocks.1.0.in_layers.0.weight": randn(32),
    }
    return {"lora_controlnet": torch.zeros(1), "input_blocks.0.0.up": randn(32, 4), **own}


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (["lllite_unet_input_blocks_4_1_attn1_to_q.down.0.weight"], "a ControlNet-LLLite"),
        (["image_proj.proj.weight"], "an IP-Adapter"),
        (["1.to_k_ip.weight"], "an IP-Adapter"),
        (["0.to_q_lora.down.weight"], "an IP-Adapter FaceID"),
        (["image_proj.a.weight", "ip_adapter.3.to_k_lora.up.weight"], "an IP-Adapter FaceID"),
        (
            ["down_blocks.0.motion_modules.0.temporal_transformer.a.b"],
            "an AnimateDiff motion module",
        ),
        (["768.0.linear.0.weight"], "a hypernetwork"),
        (
            ["down_blocks.0.motion_modules.0.temporal_transformer.a.lora_A.weight"],
            "an AnimateDiff motion LoRA",
        ),
        (["input_hint_block.0.weight"], "a ControlNet"),
        (["decoder.up_blocks.0.resnets.0.conv1.weight"], "a VAE"),
        (
            ["diffusion_model.double_stream_blocks.0.block.a.lora_A.weight"],
            "an adapter for HiDream",
        ),
    ],
)
def test_what_is_no_adapter_for_a_model_is_refused_by_its_name(
    engine: LoraEngine, tmp_path: Path, keys: list[str], kind: str
) -> None:
    path = write(tmp_path / "a.safetensors", {key: randn(4, 4) for key in keys})
    with pytest.raises(LoraIncompatible) as caught:
        load(path, engine.key_map, "x")
    assert caught.value.sentence == f"the file is {kind}, and not for this model"


def test_a_control_lora_overwrites_no_norms(engine: LoraEngine, tmp_path: Path) -> None:
    with pytest.raises(LoraIncompatible) as caught:
        load(write(tmp_path / "a.safetensors", control_lora()), engine.key_map, "x")
    assert "the file is a Control-LoRA" in caught.value.sentence


BARE = "unet.down_blocks.1.attentions.0.transformer_blocks.0.norm{}"


def norms(count: int) -> dict[str, Tensor]:
    return {
        f"{BARE.format(n + 1)}.{p}": randn(64) for n in range(count) for p in ("weight", "bias")
    }


@pytest.mark.parametrize(
    "beside",
    [
        {},
        {f"{SELF_SGM}.scale_weight": torch.tensor(1.0), "scaled_fp8": torch.zeros(2)},
        {f"{SELF_SGM}.lora_up.weight": randn(64, 2), f"{SELF_SGM}.lora_down.weight": randn(2, 64)},
    ],
)
def test_a_models_own_weights_are_no_adapter(
    engine: LoraEngine, tmp_path: Path, beside: dict[str, Tensor]
) -> None:
    with pytest.raises(LoraUnsupported) as caught:
        load(write(tmp_path / "a.safetensors", {**norms(3), **beside}), engine.key_map, "x")
    assert "a model's own weights" in caught.value.sentence


def test_a_bare_weight_beside_an_adapter_is_an_adapters(engine: LoraEngine, tmp_path: Path) -> None:
    file = load(write(tmp_path / "a.safetensors", {**norms(1), **kohya()}), engine.key_map, "x")
    assert file.unused == ()
    assert file.algorithms == ("lora", "full")


def test_a_peft_config_says_that_whole_weights_are_an_adapter(
    engine: LoraEngine, tmp_path: Path
) -> None:
    tensors = {f"base_model.model.{BARE[5:].format(1)}.{p}": randn(64) for p in ("weight", "bias")}
    path = write(tmp_path / "a.safetensors", tensors)
    file = load(path, engine.key_map, "x", config='{"peft_type": "LN_TUNING"}')
    assert (file.keys, file.modules) == (2, 1)


# --- the tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "family"),
    [
        ("sdxl_base_v1-0", "SDXL"),
        ("sdxl_", "SDXL"),
        ("pony", "SDXL"),
        ("Illustrious-XL-v1", "SDXL"),
        ("noobai", "SDXL"),
        ("juggernautXL_v9", "SDXL"),
        ("wan-shuXL", "SDXL"),
        ("PixArt-XL-2", "PixArt"),
        ("ponyv7", "AuraFlow"),
        ("taiwanese-food", None),
        ("swan-lake", None),
        ("wan_2_2", "Wan"),
        ("qwen_image", "Qwen-Image"),
        ("FLUX.2-dev", "Flux.2"),
        ("influxdb", None),
    ],
)
def test_a_base_model_is_known_by_its_name(base: str, family: str | None) -> None:
    assert family_of(base) == family


def test_a_folder_of_somebodys_is_no_claim() -> None:
    assert claimed({"base_model_name_or_path": "/home/wan/flux/my-model"}) is None
    assert claimed({"base_model_name_or_path": "runwayml/stable-diffusion-v1-5"}) == "SD 1.5"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("diffusion_model.layers.3.attention.qkv", "Z-Image or Lumina 2"),
        ("diffusion_model.layers.28.attention.qkv", "Z-Image"),
        ("transformer.layers.3.attention.to_q", "Z-Image"),
        ("transformer.layers.3.attn.to_q", "Lumina 2"),
        ("base_model.model.model.layers.3.self_attn.q_proj", "language model"),
        ("transformer.h.0.attn.c_attn", "language model"),
        ("transformer.transformer_blocks.3.attn1.to_q", "LTX, PixArt, Sana, CogVideoX or Mochi"),
        ("transformer.transformer_blocks.3.img_mlp.net.2", "Qwen-Image"),
        ("transformer.transformer_blocks.50.attn.to_q", "Qwen-Image or HunyuanVideo"),
        ("transformer.single_transformer_blocks.40.attn.to_qkv_mlp_proj", "Flux.2"),
        ("diffusion_model.double_blocks.3.img_mod.lin", "Flux.1"),
        ("lora_unet_blocks_3_cross_attn_k_img", "Wan"),
        ("lycoris_blocks_3_attn1_to_q", "Wan or Hunyuan-DiT"),
        ("module.unet.up_blocks.0.attentions.0.proj_in", "SDXL"),
    ],
)
def test_names_show_a_family(key: str, name: str) -> None:
    header = Header({f"{key}.lora_A.weight": TensorInfo("F16", (4, 8), 0, 0)}, {})
    assert identify(header) == name


def test_names_that_many_have_and_names_of_nobody_show_nothing() -> None:
    assert families_by_names(["linear.lora_A.weight"]) == frozenset()
    assert other_kind(["linear.lora_A.weight"]) is None
    header = Header({f"{CROSS_SGM}.lora_down.weight": TensorInfo("F16", (4, 2048), 0, 0)}, {})
    assert evidence(header) == {"SDXL"}
