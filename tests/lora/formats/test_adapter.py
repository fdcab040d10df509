import json
from pathlib import Path

import pytest
import torch

from lora.engine.engine import LoraEngine
from lora.errors import LoraCorrupt, LoraIncompatible, LoraUnsupported
from lora.formats.adapter import load
from lora.formats.names.keys import KeyMap
from tests.adapters import CROSS_SGM, SELF_ATTENTION, SELF_SGM, kohya, loha, randn, sd15, write
from tests.conftest import ROOT


def test_used_and_unused_keys_are_the_whole_file(engine: LoraEngine, tmp_path: Path) -> None:
    tensors = kohya() | {
        "lora_unet_no_such_layer.alpha": torch.tensor(1.0),
        f"{SELF_SGM}.foo_scale": randn(64, 1),
    }
    file = load(write(tmp_path / "a.safetensors", tensors), engine.key_map, "x")
    assert file.keys + len(file.unused) == len(tensors)
    reasons = {unused.key: unused.reason for unused in file.unused}
    assert "no module of this model" in reasons["lora_unet_no_such_layer.alpha"]
    # A tensor that we do not know makes its whole layer another algorithm's: none of it is applied.
    for slot in ("lora_up.weight", "lora_down.weight", "alpha", "foo_scale"):
        assert "no known algorithm" in reasons[f"{SELF_SGM}.{slot}"]
    assert {str(layer.target.path) for layer in file.layers} & {SELF_ATTENTION} == set()


def test_a_layer_of_the_wrong_shape_is_reported(engine: LoraEngine, tmp_path: Path) -> None:
    tensors = kohya() | {f"{SELF_SGM}.lora_up.weight": randn(63, 4)}
    file = load(write(tmp_path / "a.safetensors", tensors), engine.key_map, "x")
    assert len(file.layers) == 2
    assert all("do not fit the layer [64, 64]" in unused.reason for unused in file.unused)


def test_an_orphan_half_is_reported(engine: LoraEngine, tmp_path: Path) -> None:
    tensors = kohya()
    del tensors[f"{CROSS_SGM}.lora_up.weight"]
    file = load(write(tmp_path / "a.safetensors", tensors), engine.key_map, "x")
    assert {unused.key for unused in file.unused} == {
        f"{CROSS_SGM}.lora_down.weight",
        f"{CROSS_SGM}.alpha",
    }


def test_a_part_of_a_second_set_blocks_its_module(engine: LoraEngine, tmp_path: Path) -> None:
    twin = f"unet.{SELF_ATTENTION}.lora_B.weight"
    file = load(
        write(tmp_path / "a.safetensors", kohya() | {twin: randn(64, 4)}), engine.key_map, "x"
    )
    assert {unused.key for unused in file.unused} == {twin} | {
        key for key in kohya() if key.startswith(SELF_SGM)
    }
    assert all("other tensors for this layer" in unused.reason for unused in file.unused)


def test_algorithms_and_rank_are_the_most_frequent(engine: LoraEngine, tmp_path: Path) -> None:
    tensors = kohya(rank=4)
    file = load(write(tmp_path / "a.safetensors", tensors), engine.key_map, "x")
    assert (file.algorithms, file.rank) == (("lora",), 4)
    file = load(write(tmp_path / "b.safetensors", loha(rank=3)), engine.key_map, "y")
    assert (file.algorithms, file.rank) == (("loha",), 3)


def test_diffusers_alpha_comes_from_the_metadata(engine: LoraEngine, tmp_path: Path) -> None:
    tensors = {
        f"unet.{SELF_ATTENTION}.lora_A.weight": randn(4, 64),
        f"unet.{SELF_ATTENTION}.lora_B.weight": randn(64, 4),
    }
    for config, scaling in (
        ({"unet.lora_alpha": 2.0}, 0.5),
        ({"unet.lora_alpha": 2.0, "unet.alpha_pattern": {SELF_ATTENTION: 8.0}}, 2.0),
        ({"unet.lora_alpha": 2.0, "unet.use_rslora": True}, 1.0),
        ({"text_encoder.lora_alpha": 2.0}, 1.0),
        ({}, 1.0),
    ):
        metadata = {"lora_adapter_metadata": json.dumps(config)}
        file = load(write(tmp_path / "a.safetensors", tensors, metadata), engine.key_map, "x")
        low_rank = file.layers[0].algorithm.low_rank()
        assert low_rank is not None
        assert low_rank.scaling == scaling
    for text in ("not json", "[1]", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": [1]}'):
        path = write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": text})
        with pytest.raises(LoraCorrupt):
            load(path, engine.key_map, "x")


def test_an_sd15_file_is_refused_though_some_of_its_layers_might_fit(
    engine: LoraEngine, tmp_path: Path
) -> None:
    with pytest.raises(LoraIncompatible) as caught:
        load(write(tmp_path / "a.safetensors", sd15() | kohya()), engine.key_map, "x")
    assert caught.value.sentence == (
        "the file was made for SD 1.5, whose cross attention reads 768 values per token, "
        "and this model's reads 96"
    )


IN = "lora_unet_input_blocks_4_1_transformer_blocks_0"


@pytest.mark.parametrize(
    ("stem", "out", "width", "said"),
    [
        (f"{IN}_attn2_to_k", 640, 2048, "made for SDXL, whose cross attention reads 2048"),
        (
            f"{IN}_attn1_to_k",
            640,
            640,
            "factors [640, 4] and [4, 640] do not fit the layer [64, 64]",
        ),
        (f"{IN}_attn1_to_v", 640, 640, "made for a model with layers of other widths"),
    ],
)
def test_a_lora_of_full_size_is_told_that_the_demos_model_is_narrower(
    engine: LoraEngine, tmp_path: Path, stem: str, out: int, width: int, said: str
) -> None:
    tensors = {f"{stem}.lora_down.weight": randn(4, width), f"{stem}.lora_up.weight": randn(out, 4)}
    metadata = {"ss_base_model_version": "sdxl_base_v1-0"}
    with pytest.raises(LoraIncompatible) as caught:
        load(write(tmp_path / "a.safetensors", tensors, metadata), engine.key_map, "x")
    assert said in caught.value.sentence
    assert caught.value.hint == "Choose a LoRA that was made for this model."


def test_a_demos_lora_is_not_said_to_be_sdxls_though_its_metadata_does(tmp_path: Path) -> None:
    lora = ROOT / "demo" / "loras" / "demo-stripes.safetensors"
    sdxl = KeyMap({"unet": {"down_blocks.1.attentions.0.attn2.to_k": {"weight": (640, 2048)}}})
    with pytest.raises(LoraIncompatible) as caught:
        load(lora, sdxl, "x")
    assert caught.value.sentence == (
        "the file was made for a model whose cross attention reads 96 values per token, "
        "and this model's reads 2048"
    )


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "Flux"),
        ("diffusion_model.blocks.0.cross_attn.q.lora_A.weight", "Wan"),
        ("transformer.transformer_blocks.0.img_mlp.net.2.lora_A.weight", "Qwen-Image"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "a language model"),
    ],
)
def test_a_file_without_a_matching_key_is_refused_by_what_it_looks_like(
    engine: LoraEngine, tmp_path: Path, key: str, family: str
) -> None:
    with pytest.raises(LoraIncompatible) as caught:
        load(write(tmp_path / "a.safetensors", {key: randn(4, 8)}), engine.key_map, "x")
    assert f"made for {family}" in str(caught.value)


def test_a_file_whose_modules_are_known_and_whose_algorithm_is_not_is_unsupported(
    engine: LoraEngine, tmp_path: Path
) -> None:
    tensors = {
        f"{SELF_SGM}.q_layer.weight": randn(4, 64),
        f"{SELF_SGM}.p_layer.weight": randn(64, 4),
        f"{SELF_SGM}.lambda_layer": randn(1, 4),
    }
    with pytest.raises(LoraUnsupported) as caught:
        load(write(tmp_path / "a.safetensors", tensors), engine.key_map, "x")
    assert "T-LoRA: the file lacks the base part" in str(caught.value)
    with pytest.raises(LoraUnsupported) as caught:
        early = {f"{SELF_SGM}.oft_diag": randn(16, 4, 4)}
        load(write(tmp_path / "a.safetensors", early), engine.key_map, "x")
    assert "an early OFT of LyCORIS" in str(caught.value)


def test_a_parsed_file_does_not_need_the_file_any_more(engine: LoraEngine, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", kohya())
    file = load(path, engine.key_map, "x")
    path.write_bytes(b"")
    part = next(layer.algorithm for layer in file.layers if layer.target.path == SELF_ATTENTION)
    expected = kohya()[f"{SELF_SGM}.lora_up.weight"] @ kohya()[f"{SELF_SGM}.lora_down.weight"] * 0.5
    torch.testing.assert_close(part.delta(torch.zeros(64, 64)), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_file_with_nan_or_infinity_is_refused(
    engine: LoraEngine, tmp_path: Path, bad: float
) -> None:
    tensors = kohya()
    tensors[f"{SELF_SGM}.lora_up.weight"][3, 1] = bad
    with pytest.raises(LoraCorrupt) as caught:
        load(write(tmp_path / "a.safetensors", tensors), engine.key_map, "x")
    assert f"{SELF_SGM}.lora_up.weight holds NaN or infinity" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"lora_up.weight": randn(64, 0), "lora_down.weight": randn(0, 64)}, "a tensor is empty"),
        ({"alpha": torch.ones(2)}, "alpha is not one number"),
        ({"lora_up.weight": torch.tensor(1.0)}, "do not fit together"),
        ({"lora_down.weight": torch.ones(4)}, "do not fit together"),
    ],
)
def test_malformed_layers_are_reported_before_anything_is_applied(
    engine: LoraEngine, tmp_path: Path, tensors: dict[str, torch.Tensor], reason: str
) -> None:
    broken = kohya() | {f"{SELF_SGM}.{name}": tensor for name, tensor in tensors.items()}
    file = load(write(tmp_path / "a.safetensors", broken), engine.key_map, "x")
    assert len(file.layers) == 2
    assert all(reason in unused.reason for unused in file.unused)


def test_flat_loha_factors_are_reported(engine: LoraEngine, tmp_path: Path) -> None:
    tensors = loha() | kohya()
    stem = "lycoris_" + SELF_ATTENTION.replace(".", "_")
    tensors = {k: v for k, v in tensors.items() if not k.startswith(SELF_SGM)}
    tensors[f"{stem}.hada_w1_b"] = torch.tensor(1.0)
    file = load(write(tmp_path / "a.safetensors", tensors), engine.key_map, "x")
    assert {unused.reason for unused in file.unused} == {"a factor has less than two dimensions"}


def test_an_embedding_does_not_excuse_another_models_cross_attention(
    unet: torch.nn.Module, tmp_path: Path
) -> None:
    other = torch.nn.ModuleDict(
        {"embeddings": torch.nn.ModuleDict({"token_embedding": torch.nn.Embedding(9, 768)})}
    )
    own = LoraEngine({"unet": unet, "text_encoder": other})
    tensors = sd15() | {"bundle_emb.cat.clip_l": randn(1, 768)}
    with pytest.raises(LoraIncompatible):
        load(write(tmp_path / "a.safetensors", tensors), own.key_map, "x")


def test_a_files_names_cannot_become_fields_of_ours(engine: LoraEngine, tmp_path: Path) -> None:
    tensors = kohya() | {f"{SELF_SGM}.neumann_terms": randn(3), f"{CROSS_SGM}.oft_r": randn(64)}
    file = load(write(tmp_path / "a.safetensors", tensors), engine.key_map, "x")
    assert file.modules == 1
    assert all("no known algorithm" in unused.reason for unused in file.unused)


def test_reasons_stay_short_however_many_tensors_a_layer_has(
    engine: LoraEngine, tmp_path: Path
) -> None:
    tensors = kohya() | {f"{SELF_SGM}.{'x' * 100}{n}": torch.ones(1) for n in range(500)}
    file = load(write(tmp_path / "a.safetensors", tensors), engine.key_map, "x")
    assert len(file.unused) == 503
    assert max(len(unused.reason) for unused in file.unused) < 500
