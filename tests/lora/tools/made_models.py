"""Tiny models on disk for the tools' tests; the original code's names are written out by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.adapters import randn
from tests.conftest import ROOT

DEMO = ROOT / "demo" / "model"
UNET = "diffusion_pytorch_model.safetensors"

# SDXL's blocks, read off the original code's UNet: diffusers' name -> its own.
BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.resnets.1": "input_blocks.2.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0": "input_blocks.4.0",
    "down_blocks.1.attentions.0": "input_blocks.4.1",
    "down_blocks.1.resnets.1": "input_blocks.5.0",
    "down_blocks.1.attentions.1": "input_blocks.5.1",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    "down_blocks.2.resnets.0": "input_blocks.7.0",
    "down_blocks.2.attentions.0": "input_blocks.7.1",
    "down_blocks.2.resnets.1": "input_blocks.8.0",
    "down_blocks.2.attentions.1": "input_blocks.8.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.resnets.2": "output_blocks.2.0",
    "up_blocks.0.attentions.2": "output_blocks.2.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.3.0",
    "up_blocks.1.attentions.0": "output_blocks.3.1",
    "up_blocks.1.resnets.1": "output_blocks.4.0",
    "up_blocks.1.attentions.1": "output_blocks.4.1",
    "up_blocks.1.resnets.2": "output_blocks.5.0",
    "up_blocks.1.attentions.2": "output_blocks.5.1",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.2.resnets.0": "output_blocks.6.0",
    "up_blocks.2.resnets.1": "output_blocks.7.0",
    "up_blocks.2.resnets.2": "output_blocks.8.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def demo(part: str) -> dict[str, Tensor]:
    """The tensors of a part of the demo model."""
    names = {"unet": UNET, "vae": UNET}
    return load_file(DEMO / part / names.get(part, "model.safetensors"))


def sgm_unet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        block = next(b for b in BLOCKS if name.startswith(f"{b}."))
        rest = name.removeprefix(f"{block}.")
        if ".resnets." in block:
            module, _, parameter = rest.rpartition(".")
            rest = f"{RESNET[module]}.{parameter}"
        renamed[f"{BLOCKS[block]}.{rest}"] = tensor
    return renamed


def open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What Hugging Face's text encoder with a projection is in OpenCLIP."""
    made = {
        "token_embedding.weight": tensors["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": tensors["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": tensors["text_model.final_layer_norm.weight"],
        "ln_final.bias": tensors["text_model.final_layer_norm.bias"],
        "text_projection": tensors["text_projection.weight"].t().contiguous(),
        "logit_scale": torch.tensor(4.6),
    }
    for number in range(3):
        layer, block = f"text_model.encoder.layers.{number}", f"transformer.resblocks.{number}"
        for parameter in ("weight", "bias"):
            for module, theirs in OPEN_CLIP.items():
                made[f"{block}.{theirs}.{parameter}"] = tensors[f"{layer}.{module}.{parameter}"]
            thirds = [tensors[f"{layer}.self_attn.{x}_proj.{parameter}"] for x in "qkv"]
            made[f"{block}.attn.in_proj_{parameter}"] = torch.cat(thirds)
    return made


def sdxl_single(path: Path) -> Path:
    """The demo model as one file, as Stability published SDXL, and as trainers add to it."""
    clip = {f"text_model.{name}": tensor for name, tensor in demo("text_encoder").items()}
    clip["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    unet = sgm_unet(demo("unet"))
    parts = {
        "model.diffusion_model.": unet,
        "conditioner.embedders.0.transformer.": clip,
        "conditioner.embedders.1.model.": open_clip(demo("text_encoder_2")),
        "first_stage_model.": {"encoder.conv_in.weight": randn(16, 3, 3, 3)},
        "model_ema.": {"diffusion_modelout2weight": unet["out.2.weight"].float() + 1},
        "": {"alphas_cumprod": randn(1000)},
    }
    tensors = {
        prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()
    }
    save_file(tensors, path, {"format": "pt", "modelspec.title": "tiny"})
    return path


def folder(path: Path, **changes: Mapping[str, Tensor]) -> Path:
    """The demo model's own folder; `changes`: part -> all of its tensors."""
    shutil.copytree(DEMO, path)
    for part, tensors in changes.items():
        name = UNET if part in ("unet", "vae") else "model.safetensors"
        save_file(dict(tensors), path / part / name, {"format": "pt"})
    return path


WAN_SHAPES = {
    "patch_embedding.weight": (12, 4, 1, 2, 2),
    "patch_embedding.bias": (12,),
    "blocks.0.modulation": (1, 6, 12),
    "blocks.0.self_attn.q.weight": (12, 12),
    "blocks.0.self_attn.q.bias": (12,),
    "blocks.0.self_attn.norm_q.weight": (12,),
    "blocks.0.ffn.0.weight": (20, 12),
    "blocks.0.ffn.0.bias": (20,),
    "blocks.1.modulation": (1, 6, 12),
    "blocks.1.self_attn.q.weight": (12, 12),
    "blocks.1.self_attn.q.bias": (12,),
    "blocks.1.self_attn.norm_q.weight": (12,),
    "blocks.1.ffn.0.weight": (20, 12),
    "blocks.1.ffn.0.bias": (20,),
    "head.modulation": (1, 2, 12),
    "head.head.weight": (16, 12),
}


def wan(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A model that is not known: it keeps its own names."""
    shapes = WAN_SHAPES.items()
    return {name: randn(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(shapes)}


def sharded(path: Path, tensors: Mapping[str, Tensor], stem: str = "model") -> Path:
    """A folder with two shards and their list."""
    path.mkdir()
    names = list(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    where = {}
    for number, half in enumerate(halves, 1):
        file = f"{stem}-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, path / file)
        where |= dict.fromkeys(half, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (path / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return path
