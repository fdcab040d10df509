"""Names are checked against lists written out by hand from trainers' files, not against our own rules."""

import pytest
from torch import nn

from lora.engine.engine import LoraEngine
from lora.formats.names.keys import KeyMap
from lora.formats.names.sgm import sgm_path

# diffusers path -> the name in the original code, read off SDXL's own conversion tables.
SGM = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    ),
    "down_blocks.1.attentions.1.proj_in": "input_blocks.5.1.proj_in",
    "down_blocks.2.resnets.0.conv_shortcut": "input_blocks.7.0.skip_connection",
    "down_blocks.2.attentions.1.transformer_blocks.1.ff.net.0.proj": (
        "input_blocks.8.1.transformer_blocks.1.ff.net.0.proj"
    ),
    "mid_block.resnets.0.conv2": "middle_block.0.out_layers.3",
    "mid_block.attentions.0.proj_out": "middle_block.1.proj_out",
    "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
    "up_blocks.0.attentions.2.proj_in": "output_blocks.2.1.proj_in",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.resnets.0.conv1": "output_blocks.3.0.in_layers.2",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.2.resnets.2.conv2": "output_blocks.8.0.out_layers.3",
    "time_embedding.linear_1": "time_embed.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}

STEMS = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    ),
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    ),
    "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    ),
    "unet.mid_block.attentions.0.proj_in": "mid_block.attentions.0.proj_in",
    "base_model.model.mid_block.attentions.0.proj_in": "mid_block.attentions.0.proj_in",
    "lora_unet_add_embedding_linear_1": "add_embedding.linear_1",
    "lora_unet_label_emb_0_0": "add_embedding.linear_1",
}


@pytest.mark.parametrize(("path", "name"), SGM.items())
def test_sgm_path_of_sdxl(unet: nn.Module, path: str, name: str) -> None:
    paths = [name for name, _ in unet.named_modules()]
    assert path in paths
    assert sgm_path(path, paths) == name


def test_upsampler_of_a_block_without_attention_stands_second() -> None:
    siblings = ["down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.1.conv1"]
    assert sgm_path("up_blocks.0.upsamplers.0.conv", siblings) == "output_blocks.2.1.conv"


@pytest.mark.parametrize(("stem", "path"), STEMS.items())
def test_every_trainers_name_finds_its_module(engine: LoraEngine, stem: str, path: str) -> None:
    key_map = engine.key_map
    for suffix, slot in (
        ("lora_down.weight", "lora_down"),
        ("lora_B.weight", "lora_up"),
        ("alpha", "alpha"),
        ("hada_w1_a", "hada_w1_a"),
        ("lora_A.default.weight", "lora_down"),
    ):
        match = key_map.match(f"{stem}.{suffix}")
        assert match is not None
        assert (match.target.path, match.slot) == (path, slot)


def test_every_linear_layer_and_convolution_of_the_unet_has_a_kohya_name(
    engine: LoraEngine, unet: nn.Module
) -> None:
    paths = [name for name, _ in unet.named_modules()]
    layers = [n for n, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for path in layers:
        name = sgm_path(path, paths)
        assert name is not None, path
        match = engine.key_map.match(f"lora_unet_{name.replace('.', '_')}.alpha")
        assert match is not None
        assert match.target.path == path


def test_text_encoders_are_found_with_and_without_text_model() -> None:
    targets = {
        "text_encoder": {"encoder.layers.0.self_attn.q_proj": (8, 8)},
        "text_encoder_2": {
            "text_model.encoder.layers.0.self_attn.q_proj": (8, 8),
            "text_projection": (8, 8),
        },
    }
    key_map = KeyMap(targets)
    for key, where in {
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha": "text_encoder",
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.alpha": "text_encoder_2",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": "text_encoder",
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight": "text_encoder",
        "lora_te2_text_projection.lora_up.weight": "text_encoder_2",
    }.items():
        match = key_map.match(key)
        assert match is not None, key
        assert match.target.component == where


def test_unknown_modules_and_suffixes_are_told_apart(engine: LoraEngine) -> None:
    key_map = engine.key_map
    assert key_map.match("lora_unet_no_such_layer.alpha") is None
    assert key_map.match("no dots at all") is None
    match = key_map.match("lora_unet_input_blocks_4_1_proj_in.dora_scale")
    assert match is not None
    assert match.slot == "dora_scale"


def test_two_modules_under_one_name_are_an_error_when_the_map_is_built() -> None:
    with pytest.raises(ValueError, match="would mean both"):
        KeyMap({"unet": {"a.b": (1, 1), "a_b": (1, 1)}})
