"""What is told of an adapter file, without a model and against one."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora.engine.engine import LoraEngine
from lora.errors import LoraCorrupt, LoraError, LoraNotFound, LoraUnsupported
from lora.formats.algorithms import recipes
from lora.formats.algorithms.base import Algorithm
from lora.formats.header import read_header
from lora.formats.names.slots import SLOTS, split_key
from lora.tools.adapters.metadata import clean, word_counts
from lora.tools.adapters.own_names import own_key_map
from lora.tools.describe import Description, describe
from lora.tools.describe_names import block_of, kind_of, layout_of
from lora.tools.factors.lowrank import delta_norm
from tests.adapters import CONV_SGM, SELF_ATTENTION, SELF_SGM, kohya, loha, randn, sd15, write
from tests.conftest import ROOT
from tests.lora.small import NAMES, Small, adapter, bind, small, tensors_of

TRAINED = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.trigger_phrase": "wtrclr style",
    "ss_tag_frequency": json.dumps({"a": {"robot": 3, "sky": 1}, "b": {"robot": 4}}),
    "ss_dataset_dirs": json.dumps({"10_robot": {"n_repeats": 10, "img_count": 7}}),
    "ss_resolution": "(1024, 1024)",
    "ss_steps": "1600",
    "ss_clip_skip": "None",
    "ss_training_comment": "hello\n\x1b[31mred",
}


def told(
    folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> Description:
    return describe(write(folder / "file.safetensors", tensors, metadata))


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "layout"),
    [
        (f"{SELF_SGM}.lora_up.weight", "kohya, SGM names"),
        ("lora_unet_down_blocks_1_attentions_0_proj_in.alpha", "kohya, diffusers' block names"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "kohya, text encoders"),
        ("lora_unet_double_blocks_0_img_attn_qkv.alpha", "kohya"),
        ("lycoris_down_blocks_1.hada_w1_a", "LyCORIS wrapper"),
        ("oft_unet_input_blocks_4_1.oft_blocks", "sd-scripts OFT"),
        ("base_model.model.x.lora_A.weight", "PEFT"),
        ("unet.x.attn1.processor.to_q_lora.down.weight", "diffusers, old attention processors"),
        ("unet.down_blocks.0.lora_A.weight", "diffusers"),
        ("unet.input_blocks.4.1.proj_in.lora_down.weight", "OMI"),
        ("clip_l.text_model.x.lora_down.weight", "OMI"),
        ("diffusion_model.blocks.0.self_attn.q.lora_down.weight", None),
        ("bundle_emb.word.clip_l", "textual inversion"),
        ("clip_g", "textual inversion"),
        ("blocks.0.diff", "module names without a prefix"),
    ],
)
def test_a_keys_layout_is_told(key: str, layout: str | None) -> None:
    assert layout_of(key) == (layout or "ComfyUI, LightX2V (the model's own names)")


@pytest.mark.parametrize(
    ("component", "path", "block"),
    [
        ("unet", "input_blocks_4_1_transformer_blocks_0_attn1_to_q", "IN04"),
        ("unet", "middle_block.1.proj_in", "MID"),
        ("unet", "mid_block.attentions.0.proj_in", "MID"),
        ("unet", "output_blocks_5_2_conv", "OUT05"),
        ("unet", "down_blocks.1.attentions.0.proj_in", "IN04"),
        ("unet", "down_blocks_2_resnets_1_conv1", "IN08"),
        ("unet", "down_blocks_0_downsamplers_0_conv", "IN03"),
        ("unet", "up_blocks.0.attentions.2.proj_in", "OUT02"),
        ("unet", "up_blocks.1.upsamplers.0.conv", "OUT05"),
        ("unet", "conv_in", "IN00"),
        ("unet", "time_embedding.linear_1", "BASE"),
        ("text_encoder", "encoder.layers.3.mlp.fc1", "all"),
        ("transformer", "blocks.7.ffn.0", "blocks 07"),
        ("transformer", "single_transformer_blocks.12.attn.to_q", "single_transformer_blocks 12"),
        ("transformer", "double_blocks_3_img_attn_qkv", "double_blocks 03"),
    ],
)
def test_a_modules_block_is_told(component: str, path: str, block: str) -> None:
    assert block_of(component, path) == block


def test_a_block_is_the_one_by_which_the_worker_scales(engine: LoraEngine) -> None:
    targets = engine.key_map.targets
    assert len(targets) > 200
    for target in targets:
        assert block_of("unet", target.path) == target.block
        assert block_of("unet", target.path.replace(".", "_")) == target.block


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "cross attention"),
        ("input_blocks_4_1_transformer_blocks_0_attn1_to_q", "self attention"),
        ("down_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj", "feed-forward"),
        ("down_blocks_1_attentions_0_proj_in", "projection"),
        ("input_blocks_1_0_in_layers_2", "resnet"),
        ("down_blocks.0.resnets.0.conv1", "resnet"),
        ("down_blocks_0_downsamplers_0_conv", "sampler"),
        ("blocks.0.norm3", "norm"),
        ("encoder.layers.0.mlp.fc1", "feed-forward"),
    ],
)
def test_a_modules_kind_is_told(path: str, kind: str) -> None:
    assert kind_of(path) == kind


def test_a_key_is_split_before_its_longest_known_suffix() -> None:
    assert split_key("unet.a.to_q.lora.down.weight") == ("unet.a.to_q", "lora_down")
    assert split_key("a.lora_A.default.weight") == ("a", "lora_down")
    assert split_key("a.b.nothing_known") is None


# --- without a model ----------------------------------------------------------------------------


def test_a_kohya_file_is_told_whole(tmp_path: Path) -> None:
    found = told(tmp_path, kohya(rank=4, alpha=2.0), TRAINED)
    assert found.algorithms == {"lora": 3}
    assert found.layouts == {"kohya, SGM names": 9}
    assert found.base == "SDXL"
    assert set(found.base_told_by) == {"ss_base_model_version", "modelspec.architecture"}
    unet = found.components["unet"]
    assert unet.modules == 3
    assert unet.kinds == {"cross attention": 1, "resnet": 1, "self attention": 1}
    assert unet.rank and (unet.rank.least, unet.rank.most, unet.rank.usual) == (4, 4, 4)
    assert unet.alpha and unet.alpha.usual == 2
    assert unet.scaling and unet.scaling.usual == 0.5
    assert found.words == {"wtrclr style": 0, "robot": 7, "sky": 1}
    assert found.training["steps"] == "1600"
    assert found.training["datasets"] == "10_robot (7 images x 10)"
    assert "clip skip" not in found.training
    assert found.unused == ()
    assert [one.block for one in found.norms] == ["IN01", "IN04"]
    json.dumps(asdict(found))


def test_different_ranks_are_told_as_a_spread(tmp_path: Path) -> None:
    tensors = kohya(rank=4, alpha=2.0)
    tensors[f"{CONV_SGM}.lora_down.weight"] = randn(8, 32, 3, 3)
    tensors[f"{CONV_SGM}.lora_up.weight"] = randn(32, 8, 1, 1)
    unet = told(tmp_path, tensors).components["unet"]
    assert unet.rank and (unet.rank.least, unet.rank.most, unet.rank.usual) == (4, 8, 4)
    assert unet.scaling and (unet.scaling.least, unet.scaling.most) == (0.25, 0.5)


def test_the_width_of_the_cross_attention_says_more_than_the_metadata(tmp_path: Path) -> None:
    found = told(tmp_path, sd15(), {"ss_base_model_version": "sdxl_base_v1-0"})
    assert found.base == "SD 1.5"
    assert found.base_told_by["names and shapes"] == "SD 1.5"
    assert any("ss_base_model_version says SDXL" in words for words in found.warnings)


def test_a_file_without_alpha_says_so(tmp_path: Path) -> None:
    found = told(tmp_path, kohya(alpha=None))
    assert found.components["unet"].alpha is None
    assert any("nothing of alpha" in words for words in found.warnings)


def test_alpha_is_read_from_diffusers_metadata(tmp_path: Path) -> None:
    tensors = {"unet.a.lora_A.weight": randn(4, 8), "unet.a.lora_B.weight": randn(6, 4)}
    config = json.dumps({"unet.r": 4, "unet.lora_alpha": 1})
    found = told(tmp_path, tensors, {"lora_adapter_metadata": config})
    assert found.components["unet"].scaling.usual == 0.25  # type: ignore[union-attr]


def test_a_peft_folder_is_told_with_its_config(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.a.to_q.lora_A.weight": randn(4, 8),
        "base_model.model.a.to_q.lora_B.weight": randn(6, 4),
    }
    write(tmp_path / "adapter_model.safetensors", tensors)
    about = {"r": 4, "lora_alpha": 8, "base_model_name_or_path": "stabilityai/stable-diffusion-xl"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    found = describe(tmp_path)
    assert found.form == "PEFT folder"
    assert found.base_told_by == {"base_model_name_or_path": "stabilityai/stable-diffusion-xl"}
    assert found.base == "SDXL"
    assert found.components["unet"].scaling.usual == 2  # type: ignore[union-attr]


def test_a_pickle_is_told_as_the_same_file_in_safetensors_is(tmp_path: Path) -> None:
    torch.save({"state_dict": kohya()}, tmp_path / "file.pt")
    of_pickle, plain = describe(tmp_path / "file.pt"), told(tmp_path, kohya())
    assert of_pickle.form == "pickle"
    assert of_pickle.components == plain.components
    assert of_pickle.norms == plain.norms
    assert of_pickle.hashes.autov3 is None


def test_a_wan_file_is_told_with_its_differences(tmp_path: Path) -> None:
    stem = "diffusion_model.blocks.0"
    tensors = {
        f"{stem}.cross_attn.q.lora_down.weight": randn(2, 16),
        f"{stem}.cross_attn.q.lora_up.weight": randn(16, 2),
        f"{stem}.norm3.diff": randn(16),
        f"{stem}.norm3.diff_b": randn(16),
        f"{stem}.diff_m": randn(1, 6, 16),
    }
    found = told(tmp_path, tensors)
    assert found.base == "Wan"
    assert found.algorithms == {"full": 2, "lora": 1}
    assert found.components["transformer"].modules == 3
    assert found.unused == ()
    (only,) = found.norms
    whole = sum(float(t.norm()) ** 2 for key, t in tensors.items() if ".diff" in key)
    product = (
        tensors[f"{stem}.cross_attn.q.lora_up.weight"]
        @ tensors[f"{stem}.cross_attn.q.lora_down.weight"]
    )
    assert only.block == "blocks 00"
    assert only.norm == pytest.approx((whole + float(product.norm()) ** 2) ** 0.5, rel=1e-5)


def test_words_in_the_file_are_told(tmp_path: Path) -> None:
    tensors = {**kohya(), "bundle_emb.wtrclr.clip_l": randn(2, 768), "clip_g": randn(1, 1280)}
    found = told(tmp_path, tensors)
    assert found.embeddings == ("", "wtrclr")
    assert found.algorithms == {"lora": 3, "textual inversion": 2}


def test_a_tensor_that_nobody_knows_is_listed(tmp_path: Path) -> None:
    found = told(tmp_path, {**kohya(), f"{SELF_SGM}.strange": randn(3), "alone": randn(1)})
    unused = {one.key for one in found.unused}
    assert {f"{SELF_SGM}.strange", "alone"} <= unused
    assert found.algorithms == {"lora": 2}


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_is_read_without_a_model(tmp_path: Path, name: str) -> None:
    found = told(tmp_path, tensors_of(name))
    assert found.algorithms == {
        one: len({layer.target for layer in adapter(name).layers if layer.algorithm.name == one})
        for one in adapter(name).algorithms
    }
    assert found.unused == ()


@pytest.mark.parametrize("name", NAMES)
def test_the_norm_is_that_of_the_delta(name: str) -> None:
    root = small()
    for layer in adapter(name).layers:
        weight = root.get_submodule(layer.target.path).get_parameter(layer.parameter)
        found = delta_norm(layer.algorithm, tuple(weight.shape))
        if found is None:
            assert name in ("dora", "oft", "boft", "peft_oft", "glora", "ia3", "set_weight")
        else:
            expected = float(layer.algorithm.delta(weight.detach()).double().norm())
            assert found == pytest.approx(expected, rel=1e-5)


def test_layers_whose_change_depends_on_the_model_are_counted(tmp_path: Path) -> None:
    found = told(tmp_path, tensors_of("dora"))
    assert (found.norms, found.without_norm) == ((), 1)


def test_alpha_scales_the_norm_whatever_its_sign() -> None:
    up, down = randn(4, 2), randn(2, 3, seed=1)
    for alpha, factor in ((-1.0, 0.5), (3.0, 1.5), (0.0, 1.0)):
        slots = {"lora_up": up, "lora_down": down, "alpha": torch.tensor(alpha)}
        part: Algorithm = recipes(frozenset(slots))[0][0].make(slots)
        assert delta_norm(part, (4, 3)) == pytest.approx(
            factor * float((up @ down).norm()), rel=1e-5
        )
    zero = recipes(frozenset(slots))[0][0].make({**slots, "lora_up": torch.zeros(4, 2)})
    assert delta_norm(zero, (4, 3)) == 0.0


# --- a stranger's file --------------------------------------------------------------------------


def test_nothing_in_a_description_moves_the_cursor(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\u202e\x9b31m"
    tensors = {**kohya(), f"{evil}": randn(1)}
    metadata = {**TRAINED, "ss_output_name": evil, "modelspec.trigger_phrase": evil * 100}
    found = told(tmp_path, tensors, metadata)

    def texts(value: object) -> list[str]:
        if isinstance(value, Mapping):
            return [text for pair in value.items() for one in pair for text in texts(one)]
        if isinstance(value, (list, tuple)):
            return [text for one in value for text in texts(one)]
        return [value] if isinstance(value, str) else []

    all_texts = texts(asdict(found))
    assert len(all_texts) > 20
    assert all(text.isprintable() and len(text) <= 300 for text in all_texts)
    assert found.training["comment"] == "hello ?[31mred"


@pytest.mark.parametrize(
    "text", ["[", "[1]", '{"a": 1}', '{"a": {"b": "x"}}', '{"a": {"b": -1}}', "[" * 5000, "null"]
)
def test_malformed_tag_counts_are_no_words(text: str) -> None:
    assert word_counts({"ss_tag_frequency": text}) == {}


def test_clean_cuts_and_flattens() -> None:
    assert clean("a\tb\n c") == "a b c"
    assert clean("x" * 500, 10) == "x" * 9 + "…"
    assert clean("\ud800") == "?"


@pytest.mark.parametrize(
    "tensors",
    [
        {"lora_unet_a.lora_up.weight": torch.zeros(2)},
        {
            "lora_unet_a.lora_up.weight": torch.zeros(2, 2),
            "lora_unet_a.lora_down.weight": torch.zeros(3, 2),
        },
        {"a.lora_up.weight": torch.zeros(2, 0), "a.lora_down.weight": torch.zeros(0, 2)},
        {"a.hada_w1_a": torch.zeros(2), "a.hada_w1_b": torch.zeros(2)},
        {"a.lokr_w1": torch.zeros(2)},
        {"a.oft_R.weight": torch.zeros(3)},
        {"a.diff_m": torch.zeros(3, dtype=torch.int64)},
    ],
)
def test_malformed_layers_are_unsupported_and_never_more(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    with pytest.raises(LoraUnsupported):
        told(tmp_path, tensors)


def test_thin_factors_are_not_multiplied_into_terabytes(tmp_path: Path) -> None:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    shapes = ((400_000, 1), (1, 400_000)) * 2
    loha_of = {f"a.{n}": torch.ones(s) for n, s in zip(names, shapes, strict=True)}
    tucker = {
        "b.lora_up.weight": torch.ones(400_000, 1, 1, 1),
        "b.lora_down.weight": torch.ones(1, 400_000, 1, 1),
        "b.lora_mid.weight": torch.ones(1, 1, 300, 300),
    }
    plain = {
        "c.lora_up.weight": torch.ones(400_000, 1),
        "c.lora_down.weight": torch.ones(1, 400_000),
    }
    found = told(tmp_path, {**loha_of, **tucker, **plain})
    assert found.without_norm == 2
    assert [one.norm for one in found.norms] == [pytest.approx(400_000.0)]


def test_any_tensors_under_known_names_are_told_or_refused(tmp_path: Path) -> None:
    """Five hundred small files of random slots and shapes, from a fixed seed."""
    chance = random.Random(5)
    suffixes, told_count = sorted(SLOTS), 0
    for _ in range(500):
        stems = chance.choices(
            ("unet.a.to_q", "lora_te1_b", "lycoris_c", "bundle_emb.w", "d.norm"), k=2
        )
        tensors = {
            f"{chance.choice(stems)}.{suffix}": torch.ones(
                [
                    chance.choice((0, 1, 2, 3, 4))
                    for _ in range(chance.choice((0, 1, 2, 2, 2, 3, 4)))
                ]
            )
            for suffix in chance.choices(suffixes, k=chance.randint(1, 6))
        }
        with suppress(LoraError):
            told(tmp_path, tensors)
            told_count += 1
    assert told_count > 5


def test_a_pickle_with_more_than_tensors_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    path.write_bytes(b"\x80\x02cos\nsystem\n(S'touch " + str(tmp_path / "run").encode() + b"'\ntR.")
    with pytest.raises(LoraUnsupported):
        describe(path)
    assert not (tmp_path / "run").exists()


def test_a_models_own_weights_are_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(LoraUnsupported) as caught:
        told(tmp_path, {"model.diffusion_model.out.2.weight": randn(4, 4)})
    assert "own weights" in caught.value.sentence


def test_nan_is_corrupt(tmp_path: Path) -> None:
    tensors = kohya()
    tensors[f"{SELF_SGM}.lora_up.weight"][0, 0] = float("nan")
    with pytest.raises(LoraCorrupt):
        told(tmp_path, tensors)


def test_a_missing_file_and_an_empty_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(LoraNotFound):
        describe(tmp_path / "nothing")
    with pytest.raises(LoraNotFound):
        describe(tmp_path)


def test_changed_tensors_do_not_fit_kohyas_hash(tmp_path: Path) -> None:
    found = told(tmp_path, kohya(), {"sshs_model_hash": "0" * 64})
    assert any("sshs_model_hash" in words for words in found.warnings)


def test_two_names_for_one_module_are_the_same_module(tmp_path: Path) -> None:
    tensors = {"unet.a.lora_A.weight": randn(2, 3), "unet.a.lora_B.weight": randn(4, 2)}
    twice = {k.replace("unet.", "diffusion_model."): t.clone() for k, t in tensors.items()}
    path = tmp_path / "file.safetensors"
    save_file({**tensors, **twice}, path)
    assert len(own_key_map(read_header(path)).targets) == 1
    assert describe(path).algorithms == {"lora": 1}


# --- against a model ----------------------------------------------------------------------------


def test_against_a_model_every_tensor_is_matched_or_listed(
    tmp_path: Path, engine: LoraEngine
) -> None:
    other = {
        "lora_unet_nothing.lora_down.weight": randn(2, 3),
        "lora_unet_nothing.lora_up.weight": randn(4, 2),
    }
    path = write(tmp_path / "file.safetensors", {**kohya(), **other})
    fit = describe(path, engine.key_map).fit
    assert fit
    assert (fit.modules, fit.matched, fit.unmatched) == (3, 9, 2)
    assert {one.key for one in fit.keys} == set(other)
    assert fit.trouble is None


def test_a_file_for_another_model_says_why_it_does_not_fit(
    tmp_path: Path, engine: LoraEngine
) -> None:
    fit = describe(write(tmp_path / "file.safetensors", sd15()), engine.key_map).fit
    assert fit
    assert (fit.matched, fit.unmatched) == (0, 6)
    assert "SD 1.5" in (fit.trouble or "")


@pytest.mark.parametrize("name", ["stripes", "outline", "night", "spiral"])
def test_the_demos_adapters_are_described_without_a_rest(name: str) -> None:
    found = describe(ROOT / "demo" / "loras" / f"demo-{name}.safetensors")
    assert found.unused == ()
    assert found.base == "SDXL"
    assert name in found.words
    assert found.components["unet"].modules == 230
    assert len(found.norms) == {"spiral": 20}.get(name, 18)
    assert found.without_norm == 0


def test_a_loha_has_its_rank_and_norm(tmp_path: Path) -> None:
    tensors = loha(rank=3)
    found = told(tmp_path, tensors)
    stem = "lycoris_" + SELF_ATTENTION.replace(".", "_")
    a, b, c, d = (tensors[f"{stem}.hada_{n}"] for n in ("w1_a", "w1_b", "w2_a", "w2_b"))
    assert found.components["unet"].rank.usual == 3  # type: ignore[union-attr]
    assert found.norms[0].norm == pytest.approx(float((0.5 * (a @ b) * (c @ d)).norm()), rel=1e-5)


def test_small_is_what_the_fixtures_are_for() -> None:
    made = bind(tensors_of("lora"), LoraEngine({"unet": small()}).key_map)
    assert {layer.target.path for layer in made.layers} <= set(Small.INPUTS)
