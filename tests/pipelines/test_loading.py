"""Every form of WORKER_MODEL ends in the same weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora.formats.names.sgm import sgm_path
from pipelines.loading import LoadedModels, load_models
from pipelines.weights import DEMO_MODEL, WeightsIncomplete, WeightsMissing
from settings import STOCK_MODEL, Settings

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def load(model: str, **options: Any) -> LoadedModels:
    return load_models(Settings(model=model, device="cpu", **options))


@pytest.fixture(scope="module")
def demo() -> LoadedModels:
    return load("demo")


def assert_same_weights(left: LoadedModels, right: LoadedModels) -> None:
    for part in PARTS:
        ours, theirs = (getattr(models.base, part).state_dict() for models in (left, right))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], msg=f"{part}.{name}", rtol=0, atol=0)


def test_the_demo_is_loaded_in_float32_on_the_cpu_and_named(demo: LoadedModels) -> None:
    assert (demo.name, demo.refiner, demo.device.type) == ("demo", None, "cpu")
    assert demo.base.unet.dtype is torch.float32


def test_a_folder_in_another_precision(tmp_path: Path, demo: LoadedModels) -> None:
    folder = tmp_path / "my-model-1.0"
    shutil.copytree(DEMO_MODEL, folder)
    assert_same_weights(load(str(folder)), demo)
    half = load(str(folder), dtype="bfloat16")
    assert (half.name, half.base.unet.dtype) == ("my-model-1.0", torch.bfloat16)


def test_a_folder_whose_weights_are_cut_or_gone_is_refused_by_the_files_name(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(DEMO_MODEL, folder)
    weights = next((folder / "vae").glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(WeightsIncomplete) as caught:
        load(str(folder))
    assert "vae/diffusion_pytorch_model.safetensors" in str(caught.value)
    weights.unlink()
    with pytest.raises(WeightsIncomplete) as caught:
        load(str(folder))
    assert str(caught.value) == "vae holds no .safetensors file"


def test_a_folder_with_half_precision_files(tmp_path: Path, demo: LoadedModels) -> None:
    folder = tmp_path / "fp16"
    shutil.copytree(DEMO_MODEL, folder)
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert_same_weights(load(str(folder)), demo)


def test_a_vae_and_a_refiner_of_ones_own(tmp_path: Path, demo: LoadedModels) -> None:
    models = load("demo", vae=str(DEMO_MODEL / "vae"))
    assert_same_weights(models, demo)


def test_weights_that_are_not_here_are_told() -> None:
    with pytest.raises(WeightsMissing) as caught:
        load("nobody/nothing", vae="nobody/vae")
    assert str(caught.value).startswith("nobody/nothing is neither")


# --- a single checkpoint, in the names of the original code -----------------------------------------


def original_unet(models: LoadedModels) -> Iterator[tuple[str, Tensor]]:
    paths = [name for name, _ in models.base.unet.named_modules()]
    for name, value in models.base.unet.state_dict().items():
        module, _, kind = name.rpartition(".")
        yield f"model.diffusion_model.{sgm_path(module, paths)}.{kind}", value


VAE_NAMES: tuple[tuple[str, Any], ...] = (
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)


def original_vae(models: LoadedModels) -> Iterator[tuple[str, Tensor]]:
    for name, value in models.base.vae.state_dict().items():
        renamed = name
        for pattern, replacement in VAE_NAMES:
            renamed = re.sub(pattern, replacement, renamed)
        yield f"first_stage_model.{renamed}", value


def original_text_encoders(models: LoadedModels) -> Iterator[tuple[str, Tensor]]:
    for name, value in models.base.text_encoder.state_dict().items():
        yield f"conditioner.embedders.0.transformer.text_model.{name}", value
    state = models.base.text_encoder_2.state_dict()
    prefix = "conditioner.embedders.1.model"
    renamed = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    for name, value in state.items():
        if name in renamed:
            yield f"{prefix}.{renamed[name]}", value
    yield f"{prefix}.text_projection", state["text_projection.weight"].T
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
    inner |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for index in range(models.base.text_encoder_2.config.num_hidden_layers):
        ours, theirs = (
            f"text_model.encoder.layers.{index}",
            f"{prefix}.transformer.resblocks.{index}",
        )
        for kind in ("weight", "bias"):
            stacked = [state[f"{ours}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            yield f"{theirs}.attn.in_proj_{kind}", torch.cat(stacked)
            for here, there in inner.items():
                yield f"{theirs}.{there}.{kind}", state[f"{ours}.{here}.{kind}"]


@pytest.mark.parametrize("channels", [4, 9])
def test_a_single_checkpoint_gives_the_same_weights(
    tmp_path: Path, demo: LoadedModels, channels: int
) -> None:
    """With 9 channels it is one for inpainting, whose first layer alone is another."""
    tensors = (
        dict(original_unet(demo)) | dict(original_vae(demo)) | dict(original_text_encoders(demo))
    )
    first = "model.diffusion_model.input_blocks.0.0.weight"
    own = tensors[first]
    tensors[first] = torch.cat([own, own, own], dim=1)[:, :channels]
    file = tmp_path / "tune.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)

    configs = tmp_path / f"models--{STOCK_MODEL.replace('/', '--')}" / "snapshots" / "abc"
    nothing = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(DEMO_MODEL, configs, ignore=nothing)
    models = load(str(file), weights_dir=tmp_path)
    assert models.name == "tune"
    loaded = models.base.unet.conv_in.weight
    assert torch.equal(loaded, tensors[first])
    if channels == 9:
        models.base.unet.conv_in.weight = torch.nn.Parameter(loaded[:, :4])
    assert_same_weights(models, demo)
