"""A merged model has the engine's own numbers, and everything else that was in the input, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lora.engine.engine import LoraEngine
from lora.engine.stack import LoraUse, Mode
from lora.errors import LoraIncompatible, ToolError
from lora.formats.adapter import load
from lora.formats.header import read_header
from lora.tools.merge import MergeOptions, MergeReport, merge
from lora.tools.models import outputs
from lora.tools.models.checkpoints import Checkpoint, Place, file_sha256
from tests.adapters import kohya, randn
from tests.conftest import ROOT
from tests.lora.small import NAMES, small, tensors_of
from tests.lora.tools import made_models as models
from tests.waiting import PATIENCE, until

SAME, FP32 = MergeOptions(), MergeOptions(dtype="fp32")
QUERY = "text_model.encoder.layers.1.self_attn.q_proj"


def run(
    model: Path, loras: list[LoraUse[Path]], output: Path, options: MergeOptions = SAME
) -> MergeReport:
    with Checkpoint.open(model) as checkpoint:
        return merge(checkpoint, loras, output, options)


def refusal(*arguments: object) -> str:
    with pytest.raises(ToolError) as caught:
        run(*arguments)  # type: ignore[arg-type]
    return str(caught.value)


def lora_of(rank: int, rows: int, columns: int, seed: int) -> dict[str, Tensor]:
    return {
        "lora_up.weight": 0.1 * randn(rows, rank, seed=seed),
        "lora_down.weight": 0.1 * randn(rank, columns, seed=seed + 1),
        "alpha": torch.tensor(1.0),
    }


def adapter() -> dict[str, Tensor]:
    """Over the UNet and both text encoders, an attention of OpenCLIP's and its projection among them."""
    tensors = {
        name: tensor if name.endswith("alpha") else 0.1 * tensor for name, tensor in kohya().items()
    }
    for number, (stem, size) in enumerate(
        {
            "lora_te1_text_model_encoder_layers_0_mlp_fc1": (128, 32),
            "lora_te2_" + QUERY.replace(".", "_"): (64, 64),
            "lora_te2_text_projection": (64, 64),
        }.items()
    ):
        part = lora_of(2, *size, seed=50 + number)
        tensors |= {f"{stem}.{name}": tensor for name, tensor in part.items()}
    return tensors


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    save_file(adapter(), tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def applied(lora: Path, scale: float) -> dict[Place, Tensor]:
    """Every parameter of the demo's pipeline in float32, while the engine has the LoRA merged into it."""
    components: dict[str, nn.Module] = {
        "unet": UNet2DConditionModel.from_pretrained(models.DEMO / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(models.DEMO / "text_encoder"),
        "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(
            models.DEMO / "text_encoder_2"
        ),
    }
    engine = LoraEngine({name: part.float() for name, part in components.items()})
    use = LoraUse(load(lora, engine.key_map, "any"), scale)
    with engine.applied([use], Mode.MERGED):
        return {
            Place(name, *parameter.rpartition(".")[::2]): tensor.detach().clone()
            for name, part in components.items()
            for parameter, tensor in part.named_parameters()
        }


@pytest.mark.parametrize("single", [False, True])
def test_merged_model_has_the_engines_numbers(tmp_path: Path, lora: Path, single: bool) -> None:
    model = models.sdxl_single(tmp_path / "sdxl.safetensors") if single else models.DEMO
    output = tmp_path / ("out.safetensors" if single else "out")
    report = run(model, [LoraUse(lora, 0.7)], output, FP32)
    expected = applied(lora, 0.7)
    assert report.parameters == 6
    assert [(one.used, one.unused) for one in report.loras] == [(18, ())]
    with Checkpoint.open(output) as merged, Checkpoint.open(model) as original:
        assert merged.parameters.keys() == original.parameters.keys()
        changed = 0
        for place, tensor in expected.items():
            assert torch.equal(merged.read(place), tensor), place
            changed += not torch.equal(merged.read(place), original.read(place).float())
    assert changed == 6


def same_bits(one: Tensor, other: Tensor) -> bool:
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def test_what_no_adapter_touches_stays_bit_for_bit(tmp_path: Path, lora: Path) -> None:
    model = models.sdxl_single(tmp_path / "sdxl.safetensors")
    run(model, [LoraUse(lora)], tmp_path / "out.safetensors")
    before, after = load_file(model), load_file(tmp_path / "out.safetensors")
    assert before.keys() == after.keys()
    different = {name for name in before if not same_bits(before[name], after[name])}
    second = "conditioner.embedders.1.model."
    assert different == {
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight",
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
        f"{second}transformer.resblocks.1.attn.in_proj_weight",
        f"{second}text_projection",
    }
    fused = f"{second}transformer.resblocks.1.attn.in_proj_weight"
    assert torch.equal(before[fused][64:], after[fused][64:])
    assert not torch.equal(before[fused][:64], after[fused][:64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_is_merged_as_the_engine_does(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    root = small(dtype)
    save_file(root.state_dict(), tmp_path / "model.safetensors")
    tensors = {key.removeprefix("unet."): tensor for key, tensor in tensors_of(name).items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    run(
        tmp_path / "model.safetensors",
        [LoraUse(tmp_path / "lora.safetensors", 0.6)],
        tmp_path / "out.safetensors",
    )
    engine = LoraEngine({"transformer": root})
    use = LoraUse(load(tmp_path / "lora.safetensors", engine.key_map, "any"), 0.6)
    merged = load_file(tmp_path / "out.safetensors")
    assert any(not torch.equal(merged[key], tensor) for key, tensor in root.state_dict().items())
    with engine.applied([use], Mode.MERGED):
        for key, tensor in root.state_dict().items():
            assert torch.equal(merged[key], tensor), key


def wan_lora(path: Path, **scales: float) -> Path:
    """LightX2V's naming: a LoRA, a difference of a bias, and one of a modulation."""
    tensors = {
        f"diffusion_model.blocks.0.self_attn.q.{name}": tensor
        for name, tensor in lora_of(2, 12, 12, seed=1).items()
    }
    tensors["diffusion_model.blocks.1.ffn.0.diff_b"] = randn(20, seed=7)
    tensors["diffusion_model.blocks.1.diff_m"] = randn(1, 6, 12, seed=8)
    tensors = {name: tensor * scales.get("by", 1.0) for name, tensor in tensors.items()}
    save_file(tensors, path)
    return path


def merged_wan(tensors: Mapping[str, Tensor], lora: Path, scale: float) -> dict[str, Tensor]:
    """By hand, in float64."""
    made = {name: tensor.double() for name, tensor in tensors.items()}
    found = {name: tensor.double() for name, tensor in load_file(lora).items()}
    stem = "diffusion_model.blocks.0.self_attn.q"
    change = found[f"{stem}.lora_up.weight"] @ found[f"{stem}.lora_down.weight"]
    made["blocks.0.self_attn.q.weight"] += scale * change * found[f"{stem}.alpha"] / 2
    made["blocks.1.ffn.0.bias"] += scale * found["diffusion_model.blocks.1.ffn.0.diff_b"]
    made["blocks.1.modulation"] += scale * found["diffusion_model.blocks.1.diff_m"]
    return made


@pytest.mark.parametrize("form", ["file", "pt", "ckpt", "shards", "index"])
@pytest.mark.parametrize("output", ["out.safetensors", "out.pt", "out"])
def test_every_form_of_a_model_into_every_form(tmp_path: Path, form: str, output: str) -> None:
    tensors, lora = models.wan(), wan_lora(tmp_path / "lora.safetensors")
    model = tmp_path / f"wan.{form.replace('file', 'safetensors')}"
    if form == "file":
        save_file(tensors, model)
    elif form in ("shards", "index"):
        models.sharded(model, tensors)
    else:
        torch.save({"state_dict": tensors} if form == "ckpt" else tensors, model)
    given = model / "model.safetensors.index.json" if form == "index" else model
    run(given, [LoraUse(lora, 0.7)], tmp_path / output)
    if output == "out.pt":
        table = torch.load(tmp_path / output, weights_only=True)
        assert ("state_dict" in table) == (form == "ckpt")
    expected = merged_wan(tensors, lora, 0.7)
    with Checkpoint.open(tmp_path / output) as merged:
        assert {one.raw.name for one in merged.parameters.values()} == tensors.keys()
        for place, stored in merged.parameters.items():
            assert stored.raw.dtype == torch.float32
            torch.testing.assert_close(merged.read(place).double(), expected[stored.raw.name])
    if output == "out" and form in ("shards", "index"):
        names = {one.name for one in (tmp_path / "out").iterdir()}
        assert names == {one.name for one in model.iterdir()}
    hidden = [one.name for one in tmp_path.iterdir() if one.name.startswith(".")]
    assert hidden == []


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "fp8"])
def test_dtype_of_the_output(tmp_path: Path, lora: Path, dtype: str) -> None:
    model = models.sdxl_single(tmp_path / "sdxl.safetensors")
    report = run(model, [LoraUse(lora)], tmp_path / "out.safetensors", MergeOptions(dtype))
    found: dict[str, set[str]] = {}
    for name, info in read_header(tmp_path / "out.safetensors").tensors.items():
        kind = "matrix" if len(info.shape) > 1 else "vector"
        kind = "vae" if name.startswith("first_stage") else kind
        other = name.startswith(("alphas", "model_ema")) or name.endswith(("logit_scale", "_ids"))
        found.setdefault("other" if other else kind, set()).add(info.dtype)
    big = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "fp8": "F8_E4M3"}[dtype]
    small_ones = "BF16" if dtype == "fp8" else big
    assert found == {
        "matrix": {big},
        "vector": {small_ones},
        "vae": {small_ones},
        "other": {"F32", "I64"},
    }
    assert report.bytes == sum(
        info.end - info.start for info in read_header(tmp_path / "out.safetensors").tensors.values()
    )


def test_result_is_rounded_once(tmp_path: Path) -> None:
    tensors, lora = models.wan(), wan_lora(tmp_path / "lora.safetensors")
    save_file(tensors, tmp_path / "wan.safetensors")
    loras = [LoraUse(lora, 0.3), LoraUse(lora, 0.4)]
    run(tmp_path / "wan.safetensors", loras, tmp_path / "whole.safetensors")
    run(tmp_path / "wan.safetensors", loras, tmp_path / "half.safetensors", MergeOptions("bf16"))
    whole, half = (
        load_file(tmp_path / "whole.safetensors"),
        load_file(tmp_path / "half.safetensors"),
    )
    assert all(torch.equal(whole[name].bfloat16(), half[name]) for name in whole)


def test_metadata_tells_what_was_merged_and_keeps_the_inputs(tmp_path: Path, lora: Path) -> None:
    model = models.sdxl_single(tmp_path / "sdxl.safetensors")
    tensors = load_file(model)
    save_file(tensors, model, {"modelspec.title": "tiny", "sshs_model_hash": "of other weights"})
    run(model, [LoraUse(lora, 0.5)], tmp_path / "one.safetensors")
    run(tmp_path / "one.safetensors", [LoraUse(lora, 2)], tmp_path / "two.safetensors")
    with safe_open(tmp_path / "two.safetensors", "pt") as opened:
        metadata = opened.metadata()
    sha256s = file_sha256(tmp_path / "one.safetensors"), file_sha256(lora)
    assert metadata["modelspec.title"] == "tiny"
    assert "sshs_model_hash" not in metadata
    assert metadata["model_sha256"] == sha256s[0]
    assert json.loads(metadata["merged_from"]) == [
        {"name": "lora.safetensors", "sha256": sha256s[1], "scale": 0.5},
        {"name": "lora.safetensors", "sha256": sha256s[1], "scale": 2},
    ]


def test_components_and_blocks_have_their_own_factors(tmp_path: Path, lora: Path) -> None:
    factors = LoraUse(lora, 1.0, {"text_encoder": 0.0}, {"IN04": 0.0, "BASE": 0.5})
    report = run(models.DEMO, [factors], tmp_path / "out", FP32)
    with safe_open(tmp_path / "out" / "unet" / models.UNET, "pt") as opened:
        (origin,) = json.loads(opened.metadata()["merged_from"])
    assert (origin["components"], origin["blocks"]) == (factors.components, factors.blocks)
    half = applied(lora, 0.5)
    with Checkpoint.open(tmp_path / "out") as merged, Checkpoint.open(models.DEMO) as original:
        first = Place("text_encoder", "encoder.layers.0.mlp.fc1", "weight")
        second = Place("text_encoder_2", QUERY, "weight")
        query = Place(
            "unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "weight"
        )
        convolution = Place("unet", "down_blocks.0.resnets.0.conv1", "weight")
        for place in (first, query):
            assert torch.equal(merged.read(place), original.read(place).float())
        assert torch.equal(merged.read(second), half[second])
        assert torch.equal(merged.read(convolution), applied(lora, 1.0)[convolution])
    assert report.parameters == 3


def test_folder_is_the_inputs_with_new_weights_alone(tmp_path: Path, lora: Path) -> None:
    model = models.folder(tmp_path / "model")
    unet = model / "unet" / models.UNET
    shutil.copy(unet, unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    shutil.copy(unet, model / "tiny_unet.ckpt")
    (model / ".cache").mkdir()
    (model / ".cache" / "lock").write_text("")
    report = run(model, [LoraUse(lora)], tmp_path / "out")
    assert report.left_out == (
        "tiny_unet.ckpt",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    )
    kept = {str(one.relative_to(model)) for one in model.rglob("*") if one.is_file()}
    there = {
        str(one.relative_to(tmp_path / "out"))
        for one in (tmp_path / "out").rglob("*")
        if one.is_file()
    }
    assert there == kept - set(report.left_out) - {".cache/lock"}
    assert (tmp_path / "out" / "vae" / "config.json").read_bytes() == (
        model / "vae" / "config.json"
    ).read_bytes()
    UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")


def test_a_file_is_not_named_as_the_other_format(tmp_path: Path) -> None:
    model, lora = tmp_path / "wan.safetensors", wan_lora(tmp_path / "lora.safetensors")
    save_file(models.wan(), model)
    for name, kind in (("out.safetensors", "pytorch"), ("out.ckpt", "safetensors")):
        said = refusal(model, [LoraUse(lora)], tmp_path / name, MergeOptions(format=kind))
        assert f"{name} is no name for a {kind} file" in said
        assert not (tmp_path / name).exists()


def test_a_use_with_a_range_is_refused(tmp_path: Path, lora: Path) -> None:
    for use in (LoraUse(lora, start=0.2), LoraUse(lora, end=0.5)):
        assert "has a start or an end" in refusal(models.DEMO, [use], tmp_path / "out")


def test_list_of_shards_has_the_new_sum_of_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable: list[str] = []
    write = outputs.write_durably
    monkeypatch.setattr(
        outputs,
        "write_durably",
        lambda path, *rest: (durable.append(path.name), write(path, *rest)),
    )
    model = models.sharded(tmp_path / "wan", models.wan())
    lora = wan_lora(tmp_path / "lora.safetensors")
    (tmp_path / "out").mkdir()
    run(model, [LoraUse(lora)], tmp_path / "out", MergeOptions("bf16"))
    index = "model.safetensors.index.json"
    before, after = (json.loads((f / index).read_text()) for f in (model, tmp_path / "out"))
    assert after["metadata"]["total_size"] * 2 == before["metadata"]["total_size"]
    assert after["weight_map"] == before["weight_map"]
    assert durable == [index]


def test_peft_folder_and_pickle_are_adapters_too(tmp_path: Path) -> None:
    tensors = models.wan()
    save_file(tensors, tmp_path / "wan.safetensors")
    stem = "base_model.model.blocks.0.self_attn.q"
    up, down = randn(12, 2, seed=3), randn(2, 12, seed=4)
    peft = tmp_path / "peft"
    peft.mkdir()
    parts = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "wan"}
    (peft / "adapter_config.json").write_text(json.dumps(config))
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        torch.save(parts, peft / name) if name.endswith("bin") else save_file(parts, peft / name)
        options = MergeOptions(overwrite=True)
        run(tmp_path / "wan.safetensors", [LoraUse(peft)], tmp_path / "out.safetensors", options)
        merged = load_file(tmp_path / "out.safetensors")["blocks.0.self_attn.q.weight"]
        expected = tensors["blocks.0.self_attn.q.weight"] + 3 * up @ down
        torch.testing.assert_close(merged, expected)


def test_unused_tensors_are_refused_unless_they_are_allowed(tmp_path: Path) -> None:
    save_file(models.wan(), tmp_path / "wan.safetensors")
    lora = wan_lora(tmp_path / "lora.safetensors")
    save_file({**load_file(lora), "diffusion_model.blocks.7.ffn.0.diff_b": torch.ones(20)}, lora)
    output = tmp_path / "out.safetensors"
    said = refusal(tmp_path / "wan.safetensors", [LoraUse(lora)], output)
    assert f"1 of {lora}'s 6 tensors have no place" in said
    assert "diffusion_model.blocks.7.ffn.0.diff_b (no module of this model has that name)" in said
    allowed = MergeOptions(allow_unused=True)
    report = run(tmp_path / "wan.safetensors", [LoraUse(lora)], output, allowed)
    assert [(one.used, len(one.unused)) for one in report.loras] == [(5, 1)]


def test_words_in_an_adapter_count_as_unused(tmp_path: Path, lora: Path) -> None:
    save_file({**adapter(), "bundle_emb.dog.clip_l": torch.ones(1, 32)}, lora)
    assert "dog (a word's vectors cannot be merged" in refusal(
        models.DEMO, [LoraUse(lora)], tmp_path / "out"
    )


def test_adapter_for_another_model_is_refused_by_name(tmp_path: Path, lora: Path) -> None:
    save_file(models.wan(), tmp_path / "wan.safetensors")
    with pytest.raises(LoraIncompatible, match=r"lora\.safetensors: the file was made for SDXL"):
        run(tmp_path / "wan.safetensors", [LoraUse(lora)], tmp_path / "out.safetensors")


@pytest.mark.parametrize("dtype", ["same", "fp16"])
@pytest.mark.parametrize("output", ["out.safetensors", "out"])
def test_overflow_names_the_layer_and_publishes_nothing(
    tmp_path: Path, dtype: str, output: str
) -> None:
    half = {
        n: t.to(torch.float16 if dtype == "same" else torch.float32)
        for n, t in models.wan().items()
    }
    save_file(half, tmp_path / "wan.safetensors")
    lora = wan_lora(tmp_path / "lora.safetensors")
    said = refusal(
        tmp_path / "wan.safetensors",
        [LoraUse(lora, 1e7)],
        tmp_path / output,
        MergeOptions(dtype),
    )
    assert "overflows float16" in said
    assert "transformer.blocks." in said
    assert sorted(one.name for one in tmp_path.iterdir()) == ["lora.safetensors", "wan.safetensors"]


def test_untouched_weight_that_overflows_the_new_dtype_is_named(tmp_path: Path) -> None:
    tensors = models.wan()
    tensors["head.head.weight"][0, 0] = 1e6
    tensors["blocks.0.self_attn.norm_q.weight"][0] = float("inf")  # the model's own
    save_file(tensors, tmp_path / "wan.safetensors")
    loras = [LoraUse(wan_lora(tmp_path / "lora.safetensors"))]
    output = tmp_path / "out.safetensors"
    for dtype in ("fp16", "fp8"):
        said = refusal(tmp_path / "wan.safetensors", loras, output, MergeOptions(dtype))
        assert "head.head.weight overflows float" in said
    run(tmp_path / "wan.safetensors", loras, output, MergeOptions("bf16"))


def test_output_that_is_an_input_is_refused(tmp_path: Path) -> None:
    model = models.sharded(tmp_path / "wan", models.wan())
    lora = wan_lora(tmp_path / "lora.safetensors")
    loras = [LoraUse(lora)]
    shard = model / "model-00002-of-00002.safetensors"
    before = shard.read_bytes(), lora.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(shard)
    for output in (shard, tmp_path / "link.safetensors", lora, model):
        assert f"{output} exists already" in refusal(model, loras, output)
    for output in (shard, tmp_path / "link.safetensors"):
        said = refusal(model, loras, output, MergeOptions(overwrite=True))
        assert f"{output} is one of the files of an input" in said
    assert "lies in the input" in refusal(model, loras, model / "out")
    assert (shard.read_bytes(), lora.read_bytes()) == before


def test_output_that_cannot_be_is_refused(tmp_path: Path, lora: Path) -> None:
    loras = [LoraUse(lora)]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert "full exists already" in refusal(models.DEMO, loras, tmp_path / "full")
    said = refusal(models.DEMO, loras, tmp_path / "one.safetensors")
    assert "several parts (text_encoder, text_encoder_2, unet, vae)" in said
    assert "Give a folder" in said
    assert ".gguf files cannot be written" in refusal(models.DEMO, loras, tmp_path / "a.gguf")
    assert "is no dtype" in refusal(models.DEMO, loras, tmp_path / "out", MergeOptions("int4"))
    (tmp_path / "empty").mkdir()
    pickled = MergeOptions(format="pytorch")
    assert "keep their formats" in refusal(models.DEMO, loras, tmp_path / "empty", pickled)
    (tmp_path / "no folder").write_text("")
    assert "cannot be written" in refusal(models.DEMO, loras, tmp_path / "no folder" / "out")


Usage = namedtuple("Usage", "total used free")


def test_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**7, 0, 10**7))
    said = refusal(models.DEMO, [LoraUse(lora)], tmp_path / "out")
    assert "needs 0.0 GB" in said or "GB, and the disk has" in said
    assert [one.name for one in tmp_path.iterdir()] == ["lora.safetensors"]


LIMITED = """
import resource, sys
from pathlib import Path
from lora.engine.stack import LoraUse
from lora.errors import ToolError
from lora.tools.models.checkpoints import Checkpoint
from lora.tools.merge import merge
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
try:
    with Checkpoint.open(Path(sys.argv[1])) as model:
        merge(model, [LoraUse(Path(sys.argv[2]))], Path(sys.argv[3]))
except ToolError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.slow
def test_disk_that_is_full_in_the_middle_leaves_nothing(tmp_path: Path, lora: Path) -> None:
    command = [sys.executable, "-c", LIMITED, models.DEMO, lora, tmp_path / "out"]
    done = subprocess.run(
        [str(one) for one in command],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (2, "")
    assert f"no room on the disk for {tmp_path / 'out' / 'unet' / models.UNET}. " in done.stdout
    assert [one.name for one in tmp_path.iterdir()] == ["lora.safetensors"]


SLOW = """
import sys
from pathlib import Path
from lora.engine.stack import LoraUse
from lora.tools.models.checkpoints import Checkpoint
from lora.tools.merge import merge
print("ready", flush=True)
for number in range(1000):
    with Checkpoint.open(Path(sys.argv[1])) as model:
        merge(model, [LoraUse(Path(sys.argv[2]))], Path(sys.argv[3]) / f"{number}{sys.argv[4]}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".safetensors", ".pt", ""])
def test_run_killed_at_any_moment_leaves_only_whole_models(tmp_path: Path, ending: str) -> None:
    save_file(models.wan(), tmp_path / "wan.safetensors")
    lora = wan_lora(tmp_path / "lora.safetensors")
    run(tmp_path / "wan.safetensors", [LoraUse(lora)], tmp_path / "good.safetensors")
    good = load_file(tmp_path / "good.safetensors")
    written = 0
    for pause in (0.031, 0.083, 0.157):
        out = tmp_path / f"out-{pause}"
        out.mkdir()
        command = [sys.executable, "-c", SLOW, tmp_path / "wan.safetensors", lora, out, ending]
        with subprocess.Popen(
            [str(one) for one in command], cwd=ROOT, stdout=subprocess.PIPE
        ) as running:
            assert running.stdout is not None
            assert running.stdout.readline() == b"ready\n"
            until(lambda: any(one.name[0] != "." for one in out.iterdir()))  # noqa: B023
            time.sleep(pause)
            os.kill(running.pid, signal.SIGKILL)
        for one in out.iterdir():
            if not one.name.startswith("."):
                written += 1
                with Checkpoint.open(one) as merged:
                    for place, stored in merged.parameters.items():
                        assert torch.equal(merged.read(place), good[stored.raw.name])
    assert written


def test_progress_ends_at_the_total(tmp_path: Path, lora: Path) -> None:
    told: list[tuple[int, int, str]] = []
    with Checkpoint.open(models.DEMO) as model:
        report = merge(
            model, [LoraUse(lora)], tmp_path / "out", MergeOptions(), lambda *x: told.append(x)
        )
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[-1][:2] == (report.bytes, report.bytes)
