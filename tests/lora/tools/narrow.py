"""A narrow model of SDXL's topology with both text encoders, and adapters of every algorithm for it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from demo.networks import new_unet
from lora.engine.engine import LoraEngine
from lora.engine.stack import LoraUse, Mode
from lora.formats.adapter import LoraFile, load
from lora.formats.names.keys import KeyMap
from tests.adapters import randn, write

SELF = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"  # [64, 64]
CROSS = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"  # [64, 96]
CONV = "lora_unet_input_blocks_1_0_in_layers_2"  # [32, 32, 3, 3]
POINT = "lora_unet_input_blocks_4_0_skip_connection"  # [64, 32, 1, 1]
FIRST = "lora_unet_input_blocks_0_0"  # [32, 4, 3, 3], a name without a dot in diffusers
NORM = "lora_unet_input_blocks_4_1_transformer_blocks_0_norm1"  # [64]
TEXT = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"  # [32, 32]
TEXT_2 = "lora_te2_text_model_encoder_layers_1_mlp_fc1"  # [64, 32]
SELF_DIFFUSERS = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV_DIFFUSERS = "unet.down_blocks.0.resnets.0.conv1"

Shapes = Mapping[str, tuple[int, ...]]

KOHYA: Mapping[str, Shapes] = {
    "lora": {
        f"{SELF}.lora_up.weight": (64, 4),
        f"{SELF}.lora_down.weight": (4, 64),
        f"{SELF}.alpha": (),
        f"{CROSS}.lora_up.weight": (64, 3),
        f"{CROSS}.lora_down.weight": (3, 96),
        f"{CONV}.lora_up.weight": (32, 4, 1, 1),
        f"{CONV}.lora_down.weight": (4, 32, 3, 3),
        f"{CONV}.alpha": (),
        f"{POINT}.lora_up.weight": (64, 2, 1, 1),
        f"{POINT}.lora_down.weight": (2, 32, 1, 1),
        f"{FIRST}.lora_up.weight": (32, 2, 1, 1),
        f"{FIRST}.lora_down.weight": (2, 4, 3, 3),
        f"{FIRST}.alpha": (),
    },
    "lora_text": {
        f"{SELF}.lora_up.weight": (64, 4),
        f"{SELF}.lora_down.weight": (4, 64),
        f"{TEXT}.lora_up.weight": (32, 4),
        f"{TEXT}.lora_down.weight": (4, 32),
        f"{TEXT}.alpha": (),
        f"{TEXT_2}.lora_up.weight": (64, 2),
        f"{TEXT_2}.lora_down.weight": (2, 32),
        f"{TEXT_2}.alpha": (),
    },
    "tucker": {
        f"{CONV}.lora_up.weight": (32, 4, 1, 1),
        f"{CONV}.lora_mid.weight": (4, 4, 3, 3),
        f"{CONV}.lora_down.weight": (4, 32, 1, 1),
        f"{CONV}.alpha": (),
    },
    "dora": {
        f"{SELF}.lora_up.weight": (64, 4),
        f"{SELF}.lora_down.weight": (4, 64),
        f"{SELF}.dora_scale": (64, 1),
        f"{CONV}.lora_up.weight": (32, 4, 1, 1),
        f"{CONV}.lora_down.weight": (4, 32, 3, 3),
        f"{CONV}.dora_scale": (32, 1, 1, 1),
        f"{CONV}.alpha": (),
    },
    "dora_in": {
        f"{CROSS}.lora_up.weight": (64, 4),
        f"{CROSS}.lora_down.weight": (4, 96),
        f"{CROSS}.dora_scale": (1, 96),
    },
    "loha": {
        f"{SELF}.hada_w1_a": (64, 3),
        f"{SELF}.hada_w1_b": (3, 64),
        f"{SELF}.hada_w2_a": (64, 3),
        f"{SELF}.hada_w2_b": (3, 64),
        f"{SELF}.alpha": (),
        f"{CONV}.hada_w1_a": (32, 2),
        f"{CONV}.hada_w1_b": (2, 288),
        f"{CONV}.hada_w2_a": (32, 2),
        f"{CONV}.hada_w2_b": (2, 288),
        f"{CONV}.alpha": (),
    },
    "lokr": {
        f"{SELF}.lokr_w1": (8, 8),
        f"{SELF}.lokr_w2": (8, 8),
        f"{SELF}.alpha": (),
        f"{CROSS}.lokr_w1": (8, 8),
        f"{CROSS}.lokr_w2_a": (8, 2),
        f"{CROSS}.lokr_w2_b": (2, 12),
        f"{CROSS}.alpha": (),
        f"{CONV}.lokr_w1": (4, 4),
        f"{CONV}.lokr_w2_a": (8, 2),
        f"{CONV}.lokr_w2_b": (2, 72),
        f"{CONV}.alpha": (),
    },
    "oft": {f"{SELF}.oft_blocks": (8, 8, 8), f"{SELF}.rescale": (64, 1)},
    "glora": {
        f"{SELF}.a1.weight": (64, 2),
        f"{SELF}.a2.weight": (2, 64),
        f"{SELF}.b1.weight": (64, 2),
        f"{SELF}.b2.weight": (2, 64),
        f"{SELF}.alpha": (),
    },
    "ia3": {f"{SELF}.weight": (64,), f"{SELF}.on_input": ()},
    "full": {
        f"{SELF}.diff": (64, 64),
        f"{CONV}.diff": (32, 32, 3, 3),
        f"{CONV}.diff_b": (32,),
        f"{NORM}.w_norm": (64,),
        f"{NORM}.b_norm": (64,),
    },
    "set_weight": {f"{SELF}.set_weight": (64, 64)},
}
"""What kohya and LyCORIS write; alphas are half of the rank, where they are said."""

PEFT: Mapping[str, Shapes] = {
    "lora_bias": {
        f"{SELF_DIFFUSERS}.lora_A.weight": (4, 64),
        f"{SELF_DIFFUSERS}.lora_B.weight": (64, 4),
        f"{CONV_DIFFUSERS}.lora_A.weight": (4, 32, 3, 3),
        f"{CONV_DIFFUSERS}.lora_B.weight": (32, 4, 1, 1),
        f"{CONV_DIFFUSERS}.lora_B.bias": (32,),
    },
    "peft_oft": {f"{SELF_DIFFUSERS}.oft_R.weight": (8, 28)},
    "peft_ia3": {f"{SELF_DIFFUSERS}.ia3_l": (64, 1)},
}
"""What PEFT alone writes, in diffusers' names."""

NAMES = (*KOHYA, *PEFT)


def tensors_of(name: str, dtype: torch.dtype = torch.float16, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a file of that algorithm."""
    shapes = {**KOHYA, **PEFT}[name]
    tensors = {}
    for index, (key, shape) in enumerate(shapes.items()):
        if key.endswith(".alpha"):
            tensors[key] = torch.tensor(1.5, dtype=dtype)
        elif key.endswith(".on_input"):
            tensors[key] = torch.tensor(1)
        else:
            tensors[key] = (0.2 * randn(*shape, seed=1000 * seed + index)).to(dtype)
    return tensors


@cache
def components() -> dict[str, nn.Module]:
    torch.manual_seed(0)

    def config(inner: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=inner,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=64,
        )

    return {
        "unet": new_unet().eval(),
        "text_encoder": CLIPTextModel(config(128)).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(config(64)).eval(),
    }


@cache
def engine() -> LoraEngine:
    return LoraEngine(components())


def key_map() -> KeyMap:
    return engine().key_map


def read(path: Path) -> LoraFile:
    """As the worker reads it; every tensor must be used."""
    config = path / "adapter_config.json"
    weights = path / "adapter_model.safetensors" if path.is_dir() else path
    text = config.read_text() if config.exists() else None
    file = load(weights, key_map(), str(path), config=text)
    assert file.unused == ()
    return file


def merged(*uses: LoraUse) -> dict[str, Tensor]:
    """Every parameter that the adapters change, as the engine merges them."""
    changed = {f"{layer.target}.{layer.parameter}" for use in uses for layer in use.lora.layers}
    with engine().applied(uses, Mode.MERGED):
        return {
            f"{name}.{path}": parameter.detach().clone()
            for name, root in components().items()
            for path, parameter in root.named_parameters()
            if f"{name}.{path}" in changed
        }


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def source(folder: Path, name: str, dtype: torch.dtype = torch.float16, seed: int = 0) -> Path:
    """The file of an algorithm, written by hand."""
    return write(folder / f"{name}-{seed}.safetensors", tensors_of(name, dtype, seed))
