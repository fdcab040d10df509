import json
from pathlib import Path

import httpx2
import pytest

from pipelines.weights import (
    DEMO_MODEL,
    WeightsIncomplete,
    WeightsMissing,
    bake,
    check,
    files_to_bake,
    find_weights,
    repos_to_bake,
)
from settings import STOCK_MODEL, STOCK_REFINER, STOCK_VAE, Settings
from tests.adapters import as_bytes, kohya

SDXL_BASE = [
    "README.md", "model_index.json", "sd_xl_base_1.0.safetensors", "scheduler/scheduler_config.json",
    "text_encoder/config.json", "text_encoder/flax_model.msgpack", "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors", "text_encoder/model.onnx", "tokenizer/merges.txt",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/model.onnx",
    "unet/diffusion_pytorch_model.fp16.safetensors", "vae_1_0/config.json",
]  # fmt: skip


def test_half_precision_is_baked_and_nothing_twice() -> None:
    assert files_to_bake(SDXL_BASE) == [
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
        "tokenizer/merges.txt", "unet/config.json", "vae_1_0/config.json",
        "text_encoder/model.fp16.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
    ]  # fmt: skip


def test_a_repo_without_half_precision_gives_what_it_has() -> None:
    names = ["config.json", "diffusion_pytorch_model.safetensors", "sdxl_vae.safetensors"]
    assert files_to_bake(names) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_repos_to_bake_are_those_that_the_settings_name(tmp_path: Path) -> None:
    assert repos_to_bake(Settings()) == [STOCK_MODEL, STOCK_REFINER, STOCK_VAE]
    assert repos_to_bake(Settings(model="demo")) == []
    assert repos_to_bake(Settings(model=str(tmp_path))) == []
    file = tmp_path / "m.safetensors"
    file.write_bytes(b"x")
    assert repos_to_bake(Settings(model=str(file))) == [STOCK_MODEL]


def test_find_weights_knows_the_demo_and_folders_and_asks_no_network(tmp_path: Path) -> None:
    assert find_weights("demo") == DEMO_MODEL
    assert find_weights(str(tmp_path)) == tmp_path
    for missing in ("nobody/nothing", str(tmp_path / "gone")):
        with pytest.raises(WeightsMissing) as caught:
            find_weights(missing)
        assert "download_weights.py" in str(caught.value)


def test_check_names_the_file_that_is_not_whole(tmp_path: Path) -> None:
    with pytest.raises(WeightsIncomplete):
        check(tmp_path)
    (tmp_path / "unet").mkdir()
    file = tmp_path / "unet" / "model.safetensors"
    file.write_bytes(as_bytes(kohya()))
    check(tmp_path)
    file.write_bytes(as_bytes(kohya())[:-5])
    with pytest.raises(WeightsIncomplete) as caught:
        check(tmp_path)
    assert "unet/model.safetensors" in str(caught.value)


def test_check_wants_weights_for_every_network_of_the_index(tmp_path: Path) -> None:
    index = {"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"]}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "image_encoder": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "model.safetensors").write_bytes(as_bytes(kohya()))
    with pytest.raises(WeightsIncomplete) as caught:
        check(tmp_path)
    assert "unet holds no" in str(caught.value)
    check(DEMO_MODEL)


def test_bake_tries_again_when_the_hub_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    def refuse(self: object, repo: str) -> None:
        tries.append(repo)
        raise httpx2.ConnectError("no")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    pauses: list[float] = []
    with pytest.raises(WeightsMissing):
        bake("a/b", None, pauses.append)
    assert tries == ["a/b"] * 4
    assert pauses == [5.0, 10.0, 20.0]
