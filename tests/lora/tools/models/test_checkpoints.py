"""One model in every form that it has on disk gives the same places and the same numbers."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lora.engine.engine import LoraEngine
from lora.errors import ToolError
from lora.tools.models.checkpoints import Checkpoint, Place
from tests.lora.tools import made_models as models

PARTS = ("unet", "text_encoder", "text_encoder_2")


def refusal(path: Path, kind: str | None = None) -> str:
    with pytest.raises(ToolError) as caught:
        Checkpoint.open(path, kind)
    return str(caught.value)


def test_single_file_and_folder_of_one_model_have_equal_places_and_numbers(tmp_path: Path) -> None:
    single = models.sdxl_single(tmp_path / "one.safetensors")
    with Checkpoint.open(single) as one, Checkpoint.open(models.DEMO) as other:
        first = {place for place in one.parameters if place.component in PARTS}
        second = {place for place in other.parameters if place.component in PARTS}
        assert first == second
        assert len(first) == 620 + 52 + 53
        for place in first:
            assert one.parameters[place].shape == other.parameters[place].shape, place
            assert torch.equal(one.read(place), other.read(place)), place


def test_places_are_those_of_a_live_pipeline() -> None:
    live = LoraEngine(
        {
            "unet": UNet2DConditionModel.from_pretrained(models.DEMO / "unet"),
            "text_encoder": CLIPTextModel.from_pretrained(models.DEMO / "text_encoder"),
            "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(
                models.DEMO / "text_encoder_2"
            ),
        }
    ).key_map
    with Checkpoint.open(models.DEMO) as checkpoint:
        ours = checkpoint.key_map()
    described = [
        {(t.component, t.path, t.block, tuple(sorted(t.parameters.items()))) for t in one.targets}
        for one in (live, ours)
    ]
    assert described[0] == described[1]
    assert ours.components == live.components


def test_text_encoders_have_equal_places_with_and_without_text_model(tmp_path: Path) -> None:
    old = {f"text_model.{name}": tensor for name, tensor in models.demo("text_encoder").items()}
    folder = models.folder(tmp_path / "old", text_encoder=old)
    with Checkpoint.open(folder) as one, Checkpoint.open(models.DEMO) as other:
        assert set(one.parameters) == set(other.parameters)


def test_what_is_no_parameter_is_among_the_others(tmp_path: Path) -> None:
    with Checkpoint.open(models.sdxl_single(tmp_path / "one.safetensors")) as one:
        assert {raw.name for raw in one.others} == {
            "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
            "conditioner.embedders.1.model.logit_scale",
            "model_ema.diffusion_modelout2weight",
            "alphas_cumprod",
        }
        assert Place("vae", "encoder.conv_in", "weight") in one.parameters
        assert all(target.component != "vae" for target in one.key_map().targets)
        tensors = sum(len(file.tensors) for file in one.files)
        assert len(one.holds) + len(one.others) == tensors


def test_unknown_model_keeps_its_own_names(tmp_path: Path) -> None:
    tensors = models.wan(torch.bfloat16)
    save_file(tensors, tmp_path / "wan.safetensors")
    with Checkpoint.open(tmp_path / "wan.safetensors") as checkpoint:
        assert checkpoint.parameters.keys() == {
            Place("transformer", *name.rpartition(".")[::2]) for name in tensors
        }
        modulation = Place("transformer", "blocks.0", "modulation")
        assert torch.equal(checkpoint.read(modulation), tensors["blocks.0.modulation"])
        match = checkpoint.key_map().match("diffusion_model.blocks.0.diff_m")
        assert match is not None
        assert match.target.parameter("modulation") == "modulation"


@pytest.mark.parametrize("wrapper", ["", "state_dict"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_holds_what_the_safetensors_file_holds(
    tmp_path: Path, wrapper: str, legacy: bool
) -> None:
    tensors = models.wan()
    table = {wrapper: tensors, "epoch": 3} if wrapper else tensors
    torch.save(table, tmp_path / "wan.ckpt", _use_new_zipfile_serialization=not legacy)
    with Checkpoint.open(tmp_path / "wan.ckpt", "pytorch") as checkpoint:
        assert checkpoint.files[0].wrapper == wrapper
        assert len(checkpoint.parameters) == len(tensors)
        for place, stored in checkpoint.parameters.items():
            assert torch.equal(checkpoint.read(place), tensors[stored.raw.name])


def test_fused_tensors_of_a_pickle_are_read_by_thirds(tmp_path: Path) -> None:
    tensors = {
        f"cond_stage_model.model.{n}": t
        for n, t in models.open_clip(models.demo("text_encoder_2")).items()
    }
    torch.save({"state_dict": tensors}, tmp_path / "sd2.ckpt")
    with Checkpoint.open(tmp_path / "sd2.ckpt") as checkpoint:
        place = Place("text_encoder", "encoder.layers.2.self_attn.v_proj", "weight")
        expected = models.demo("text_encoder_2")[
            "text_model.encoder.layers.2.self_attn.v_proj.weight"
        ]
        assert torch.equal(checkpoint.read(place), expected)
        assert {raw.name.rpartition(".")[2] for raw in checkpoint.others} == {
            "logit_scale",
            "text_projection",
        }


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_shards_are_one_model_by_folder_and_by_index(tmp_path: Path, stem: str) -> None:
    tensors = models.wan()
    folder = models.sharded(tmp_path / "wan", tensors, stem)
    for path in (folder, folder / f"{stem}.safetensors.index.json"):
        with Checkpoint.open(path) as checkpoint:
            assert {one.raw.name for one in checkpoint.parameters.values()} == tensors.keys()
    (folder / f"{stem}.safetensors.index.json").unlink()
    with Checkpoint.open(folder) as checkpoint:
        assert len(checkpoint.parameters) == len(tensors)


def test_the_full_variant_is_taken_and_another_only_if_it_is_alone(tmp_path: Path) -> None:
    folder = models.folder(tmp_path / "model")
    unet = folder / "unet" / models.UNET
    half = unet.with_name("diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(unet, half)
    with Checkpoint.open(folder) as checkpoint:
        assert unet in checkpoint.components
        assert half not in checkpoint.components
    unet.unlink()
    with Checkpoint.open(folder) as checkpoint:
        assert half in checkpoint.components


def test_hash_of_a_file_is_its_own_and_of_several_that_of_their_hashes(tmp_path: Path) -> None:
    folder = models.sharded(tmp_path / "wan", models.wan())
    shards = sorted(folder.glob("*.safetensors"))
    digests = [hashlib.sha256(shard.read_bytes()).digest() for shard in shards]
    with Checkpoint.open(shards[0]) as checkpoint:
        assert checkpoint.sha256() == digests[0].hex()
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.sha256() == hashlib.sha256(digests[0] + digests[1]).hexdigest()


@pytest.mark.parametrize("length", [640, 896, 1152])
def test_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    header = {"a.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode().ljust(length)
    path = tmp_path / "one.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + text + bytes(4))
    with Checkpoint.open(path) as checkpoint:
        assert len(checkpoint.parameters) == 1


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = models.sharded(tmp_path / "wan", models.wan())
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refusal(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert "model-00002-of-00002.safetensors" in refusal(folder)


def test_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = models.sharded(tmp_path / "wan", models.wan())
    second = folder / "model-00002-of-00002.safetensors"
    save_file({"patch_embedding.bias": torch.zeros(12)}, second)
    assert "both hold patch_embedding.bias" in refusal(folder)


def test_one_parameter_under_two_names_is_refused(tmp_path: Path) -> None:
    tensors = {"encoder.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}
    tensors |= {f"text_model.{name}": torch.zeros(2, 2) for name in tensors}
    tensors["embeddings.position_embedding.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "clip.safetensors")
    assert "are both text_encoder.encoder.layers.0.self_attn.q_proj" in refusal(
        tmp_path / "clip.safetensors"
    )


def test_shard_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
    assert "is no index" in refusal(tmp_path)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert "holds no weights" in refusal(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert "none of its parts has weights" in refusal(tmp_path)
    assert f"there is no {tmp_path / 'nothing'}" in refusal(tmp_path / "nothing")


def test_folder_of_several_models_is_refused(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file(models.wan(), tmp_path / name)
    assert "several models (a.safetensors, b.safetensors)" in refusal(tmp_path)


def test_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wan.safetensors"
    save_file(models.wan(), path)
    path.write_bytes(path.read_bytes()[:-5])
    assert "5 bytes are missing" in refusal(path)
    torch.save(models.wan(), tmp_path / "wan.pt")
    (tmp_path / "wan.pt").write_bytes((tmp_path / "wan.pt").read_bytes()[:-500])
    assert "broken pickle" in refusal(tmp_path / "wan.pt")


class Runs:
    ran = False

    def __reduce__(self) -> tuple[object, ...]:
        return (setattr, (Runs, "ran", True))


def test_pickle_with_more_than_tensors_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": models.wan(), "more": Runs()}, tmp_path / "bad.ckpt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Runs(), protocol=2))
    for name in ("bad.ckpt", "plain.pt"):
        assert "pickles are never run" in refusal(tmp_path / name)
    assert not Runs.ran


def test_pickle_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 1}, tmp_path / "none.pt")
    assert "no tensors by name" in refusal(tmp_path / "none.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    assert "no table" in refusal(tmp_path / "list.pt")


def test_quantised_models_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    weight = torch.zeros(4, 4)
    for name, tensors in {
        "fp8 with a scale": {"a.weight": weight, "a.scale_weight": torch.ones(1)},
        "bitsandbytes": {"a.weight": weight, "a.weight.absmax": torch.ones(1)},
        "a weight of int8": {"a.weight": weight.to(torch.int8)},
    }.items():
        save_file(tensors, path)
        assert name in refusal(path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    assert "GGUF" in refusal(tmp_path / "model.gguf")


def test_fp8_is_read(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(4, 4).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "fp8.safetensors")
    with Checkpoint.open(tmp_path / "fp8.safetensors") as checkpoint:
        read = checkpoint.read(Place("transformer", "a", "weight"))
        assert torch.equal(read.float(), tensors["a.weight"].float())


def test_another_kind_than_was_said_is_refused(tmp_path: Path) -> None:
    save_file(models.wan(), tmp_path / "wan.safetensors")
    assert "is no pytorch file" in refusal(tmp_path / "wan.safetensors", "pytorch")
    assert "is no kind" in refusal(tmp_path / "wan.safetensors", "onnx")


def test_fused_tensor_without_three_parts_is_refused(tmp_path: Path) -> None:
    tensors = models.open_clip(models.demo("text_encoder_2"))
    tensors["transformer.resblocks.0.attn.in_proj_weight"] = torch.zeros(64, 64)
    save_file(tensors, tmp_path / "clip.safetensors")
    assert "impossible shape [64, 64]" in refusal(tmp_path / "clip.safetensors")


@pytest.mark.parametrize(
    "ending",
    [
        "ia3_l",
        "a1.weight",
        "oft_R.weight",
        "lora.down.weight",
        "lora_B.weight",
        "processor.to_q_lora.up.weight",
    ],
)
def test_an_adapter_is_no_model(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "adapter.safetensors"
    save_file({f"unet.mid_block.attn1.{ending}": torch.zeros(2, 2)}, path)
    assert "is an adapter, and no model" in refusal(path)
