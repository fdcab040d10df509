"""Keys are checked against lists written by hand, and every one is read back by the library's own reader."""

import pytest

from lora.formats.header import Header, TensorInfo
from lora.formats.names.keys import KeyMap, Target
from lora.formats.names.naming import MAGNITUDE_OF, Namer, Naming, peft_types, trouble
from lora.tools.adapters.known import key_map_for, sdxl_key_map

# (component, diffusers path) -> stems; from facts on trainers' files, not from our own rules.
STEMS = {
    ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"): {
        "kohya": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "diffusers": "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "peft": "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "original": "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    },
    ("unet", "down_blocks.2.resnets.0.conv_shortcut"): {
        "kohya": "lora_unet_input_blocks_7_0_skip_connection",
        "original": "diffusion_model.input_blocks.7.0.skip_connection",
    },
    ("unet", "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj"): {
        "kohya": "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj",
        "original": "diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj",
    },
    ("unet", "up_blocks.0.upsamplers.0.conv"): {
        "kohya": "lora_unet_output_blocks_2_2_conv",
        "original": "diffusion_model.output_blocks.2.2.conv",
    },
    ("unet", "up_blocks.2.resnets.2.time_emb_proj"): {
        "kohya": "lora_unet_output_blocks_8_0_emb_layers_1",
        "peft": "base_model.model.up_blocks.2.resnets.2.time_emb_proj",
    },
    ("unet", "add_embedding.linear_1"): {
        "kohya": "lora_unet_label_emb_0_0",
        "diffusers": "unet.add_embedding.linear_1",
        "original": "diffusion_model.label_emb.0.0",
    },
    ("unet", "conv_in"): {
        "kohya": "lora_unet_input_blocks_0_0",
        "diffusers": "unet.conv_in",
        "peft": "base_model.model.conv_in",
        "original": "diffusion_model.input_blocks.0.0",
    },
    ("text_encoder", "encoder.layers.0.self_attn.q_proj"): {
        "kohya": "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "diffusers": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "original": "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj",
    },
    ("text_encoder_2", "text_model.encoder.layers.31.mlp.fc2"): {
        "kohya": "lora_te2_text_model_encoder_layers_31_mlp_fc2",
        "diffusers": "text_encoder_2.text_model.encoder.layers.31.mlp.fc2",
        "original": "text_encoders.clip_g.transformer.text_model.encoder.layers.31.mlp.fc2",
    },
    ("text_encoder_2", "text_projection"): {
        "kohya": "lora_te2_text_projection",
        "diffusers": "text_encoder_2.text_projection",
        "original": "text_encoders.clip_g.transformer.text_projection",
    },
}

SUFFIXES = {
    "kohya": {
        "lora_up": ".lora_up.weight",
        "lora_down": ".lora_down.weight",
        "lora_mid": ".lora_mid.weight",
        "alpha": ".alpha",
        "dora_scale": ".dora_scale",
        "hada_w1_a": ".hada_w1_a",
        "lokr_t2": ".lokr_t2",
        "oft_blocks": ".oft_blocks",
        "a1": ".a1.weight",
        "diff": ".diff",
        "weight": ".set_weight",
    },
    "diffusers": {
        "lora_up": ".lora_B.weight",
        "lora_down": ".lora_A.weight",
        "lora_up_bias": ".lora_B.bias",
        "magnitude": ".lora_magnitude_vector",
    },
    "peft": {
        "lora_up": ".lora_B.weight",
        "lora_down": ".lora_A.weight",
        "magnitude": ".lora_magnitude_vector",
        "hada_w1_a": ".hada_w1_a",
        "oft_r": ".oft_R.weight",
        "ia3_l": ".ia3_l",
    },
    "original": {
        "lora_up": ".lora_up.weight",
        "lora_down": ".lora_down.weight",
        "alpha": ".alpha",
        "diff": ".diff",
        "diff_b": ".diff_b",
        "diff_m": ".diff_m",
    },
}

SLOTS = (
    *("lora_up", "lora_down", "lora_mid", "alpha", "bias_indices", "bias_values", "bias_size"),
    *("lora_up_bias", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("dora_scale", "magnitude", "oft_blocks", "rescale", "oft_r", "a1", "a2", "b1", "b2", "bm"),
    *("on_input", "ia3_l", "diff", "diff_b", "diff_m", "weight", "bias"),
)


def target_of(key_map: KeyMap, component: str, path: str) -> Target:
    found = [t for t in key_map.targets if (t.component, t.path) == (component, path)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(("place", "stems"), STEMS.items(), ids=lambda one: str(one)[:60])
def test_a_modules_name_is_the_trainers(place: tuple[str, str], stems: dict[str, str]) -> None:
    target = target_of(sdxl_key_map(), *place)
    for naming, stem in stems.items():
        assert Namer(Naming(naming), sdxl_key_map()).stem(target) == stem


@pytest.mark.parametrize("naming", Naming)
def test_a_tensors_suffix_is_the_trainers(naming: Naming) -> None:
    namer = Namer(naming, sdxl_key_map())
    target = target_of(sdxl_key_map(), "unet", "conv_in")
    for slot, suffix in SUFFIXES[naming].items():
        assert namer.key(target, slot) == namer.stem(target) + suffix


@pytest.mark.parametrize("naming", Naming)
def test_every_key_of_every_module_of_sdxl_is_read_back_as_the_same(naming: Naming) -> None:
    key_map = sdxl_key_map()
    namer = Namer(naming, key_map)
    slots = [slot for slot in SLOTS if not trouble(naming, {slot})]
    named = [target for target in key_map.targets if not namer.trouble(target)]
    components = {target.component for target in named}
    assert components == ({"unet"} if naming is Naming.PEFT else set(key_map.components))
    assert len(named) == sum(t.component in components for t in key_map.targets)
    keys = set()
    for target in named:
        for slot in slots:
            key = namer.key(target, slot)
            if key is None:
                assert slot == "alpha" or naming is Naming.PEFT
                continue
            match = key_map.match(key)
            assert match is not None, key
            assert (match.target, match.slot) == (target, slot), key
            keys.add(key)
    in_config = {Naming.DIFFUSERS: 1, Naming.PEFT: 2}.get(naming, 0)
    assert len(keys) == len(named) * (len(slots) - in_config)


def test_ia3s_factors_are_no_new_weight() -> None:
    key_map = sdxl_key_map()
    namer = Namer(Naming.KOHYA, key_map)
    target = target_of(key_map, "unet", "conv_in")
    assert (
        namer.key(target, "weight", {"weight", "on_input"}) == "lora_unet_input_blocks_0_0.weight"
    )


def test_norms_have_lycoris_own_suffixes() -> None:
    key_map = sdxl_key_map()
    target = target_of(key_map, "unet", "conv_norm_out")
    assert Namer(Naming.KOHYA, key_map).key(target, "diff") == "lora_unet_out_0.w_norm"
    assert Namer(Naming.KOHYA, key_map).key(target, "diff_b") == "lora_unet_out_0.b_norm"
    assert Namer(Naming.ORIGINAL, key_map).key(target, "diff") == "diffusion_model.out.0.diff"


@pytest.mark.parametrize(
    ("naming", "slots", "reason"),
    [
        ("diffusers", ("lora_up", "lora_down", "lora_mid"), "a Tucker core"),
        ("diffusers", ("hada_w1_a", "hada_w1_b"), "LoHa"),
        ("diffusers", ("lokr_w1", "lokr_w2"), "LoKr"),
        ("diffusers", ("lora_up", "lora_down", "dora_scale"), "DoRA magnitudes of the inputs"),
        ("peft", ("lora_up", "lora_down", "hada_w1_a"), "LORA and LOHA"),
        ("peft", ("oft_blocks",), "LyCORIS' OFT"),
        ("peft", ("diff_b",), "a bias' difference"),
        ("kohya", ("oft_r",), "PEFT's OFT"),
        ("kohya", ("diff_m",), "a modulation's difference"),
        ("kohya", ("bias",), "a bias' new value"),
        ("original", ("ia3_l",), "PEFT's IA3"),
    ],
)
def test_what_a_naming_cannot_hold_has_its_reason(
    naming: str, slots: tuple[str, ...], reason: str
) -> None:
    told = trouble(Naming(naming), slots)
    assert told is not None
    assert reason in told


def test_pefts_type_of_an_algorithm() -> None:
    assert peft_types({"lora_up", "lora_down", "alpha", "magnitude"}) == ("LORA",)
    assert peft_types({"ia3_l", "on_input"}) == ("IA3",)
    assert peft_types({"weight", "on_input"}) == ()
    assert MAGNITUDE_OF[Naming.PEFT] == "magnitude"


def test_a_peft_adapter_is_for_the_network_that_draws() -> None:
    key_map = sdxl_key_map()
    target = target_of(key_map, "text_encoder_2", "text_projection")
    told = Namer(Naming.PEFT, key_map).trouble(target)
    assert told is not None
    assert "not text_encoder_2" in told


def test_stable_diffusion_1_has_kohyas_older_names() -> None:
    key_map = KeyMap(
        {
            "unet": {"down_blocks.0.attentions.0.proj_in": {"weight": (4, 4, 1, 1)}},
            "text_encoder": {"encoder.layers.0.mlp.fc1": {"weight": (4, 4)}},
        }
    )
    namer = Namer(Naming.KOHYA, key_map)
    stems = {namer.stem(target) for target in key_map.targets}
    assert stems == {
        "lora_unet_down_blocks_0_attentions_0_proj_in",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
    }


def test_a_model_with_its_own_names_keeps_them() -> None:
    key_map = KeyMap({"transformer": {"blocks.3": {"modulation": (1, 6, 8)}}})
    (target,) = key_map.targets
    key = Namer(Naming.ORIGINAL, key_map).key(target, "diff_m")
    assert key == "diffusion_model.blocks.3.diff_m"
    match = key_map.match(key)
    assert match is not None
    assert (match.target, match.slot) == (target, "diff_m")


def header(key: str, shape: tuple[int, ...], **metadata: str) -> Header:
    return Header({key: TensorInfo("F16", shape, 0, 0)}, metadata)


def test_the_known_model_is_told_from_keys_then_from_metadata() -> None:
    wide = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
    assert key_map_for(header(wide, (4, 2048))) is sdxl_key_map()
    assert key_map_for(header(wide, (4, 768), ss_base_model_version="sdxl_base_v1-0")) is None
    assert key_map_for(header("lora_unet_x.alpha", ())) is None
    assert (
        key_map_for(header("lora_unet_x.alpha", (), ss_base_model_version="sdxl_base_v1-0"))
        is sdxl_key_map()
    )


def test_sdxls_modules_are_sdxls() -> None:
    shapes = {str(t): t.parameters.get("weight") for t in sdxl_key_map().targets}
    layers = [s for n, s in shapes.items() if ".attentions." in n and s is not None and len(s) == 2]
    assert len(layers) == 722
    assert shapes["text_encoder.encoder.layers.11.mlp.fc1"] == (3072, 768)
    assert shapes["text_encoder_2.text_model.encoder.layers.31.mlp.fc2"] == (1280, 5120)
    assert shapes["text_encoder_2.text_projection"] == (1280, 1280)
