"""The names of the original code, back to diffusers': against `names.sgm`, which goes the other way."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from demo.networks import TOPOLOGY
from lora.formats.names.sgm import sgm_path
from lora.tools.models.layouts import Where, open_clip, places

SD15: dict[str, Any] = {
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "block_out_channels": (8, 16, 16, 16),
}
REFINER: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "block_out_channels": (8, 16, 16, 16),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16,
}
SDXL: dict[str, Any] = {
    **TOPOLOGY,
    "block_out_channels": (8, 16, 16),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16,
}


@pytest.mark.parametrize("config", [SD15, REFINER, SDXL], ids=["sd15", "refiner", "sdxl"])
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_every_name_of_a_unet_finds_its_way_back(config: dict[str, Any], prefix: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config, norm_num_groups=4, attention_head_dim=4)
    paths = [path for path, _ in unet.named_modules()]
    names = {}
    for name, _ in unet.named_parameters():
        path, _, parameter = name.rpartition(".")
        names[f"{prefix}{sgm_path(path, paths)}.{parameter}"] = Where(path, parameter)
    found = {one.name: one for one in places(names)}
    assert {one.component for one in found.values()} == {"unet"}
    assert {name: found[name].wheres for name in names} == {n: (w,) for n, w in names.items()}


def test_name_that_no_unet_has_is_no_parameter() -> None:
    names = [
        "input_blocks.0.0.weight",
        "out.2.weight",
        "input_blocks.1.0.more.weight",
        "extra.bias",
    ]
    found = {one.name: one.wheres for one in places(names)}
    assert found["input_blocks.1.0.more.weight"] == found["extra.bias"] == ()


def test_comfyuis_prefix_before_an_unknown_model_is_not_part_of_its_paths() -> None:
    (found,) = places(["model.diffusion_model.blocks.0.modulation"])
    assert found.component == "transformer"
    assert found.wheres == (Where("blocks.0", "modulation"),)


def test_sd2s_projection_is_no_parameter() -> None:
    assert open_clip(projected=False)("text_projection") == ()
    assert open_clip(projected=True)("text_projection.weight") == (
        Where("text_projection", "weight"),
    )
    assert open_clip(projected=True)("visual.proj") == ()
    assert open_clip(projected=True)("transformer.resblocks.0.ls_1.gamma") == ()
