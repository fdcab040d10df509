"""The same engine on other models that draw: Flux and Wan, tiny, from diffusers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from torch import Tensor, nn

from lora.engine.engine import LoraEngine
from lora.engine.stack import LoraUse, Mode
from tests.adapters import randn
from tests.lora.checks import bind, relative_error
from tests.state import unchanged

MODES = [Mode.DYNAMIC, Mode.MERGED]


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8),
    ).eval()


@pytest.fixture(scope="module")
def wan() -> nn.Module:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        image_dim=20,
        added_kv_proj_dim=24,
        rope_max_seq_len=32,
    )
    return model.eval()


def draw_flux(model: nn.Module) -> Tensor:
    return model(
        hidden_states=randn(1, 16, 4),
        encoder_hidden_states=randn(1, 5, 24, seed=1),
        pooled_projections=randn(1, 20, seed=2),
        timestep=torch.tensor([0.5]),
        img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        txt_ids=torch.zeros(5, 3),
    ).sample


def draw_wan(model: nn.Module) -> Tensor:
    return model(
        hidden_states=randn(1, 4, 1, 8, 8),
        timestep=torch.tensor([500]),
        encoder_hidden_states=randn(1, 6, 16, seed=1),
        encoder_hidden_states_image=randn(1, 257, 20, seed=2),
    ).sample


def low_rank(
    model: nn.Module, names: dict[str, str], suffixes: tuple[str, str], alpha: float | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file with these stems for these modules, and the change of each module's weight."""
    tensors, changes = {}, {}
    for seed, (stem, path) in enumerate(names.items()):
        shape = model.get_parameter(f"{path}.weight").shape
        down, up = (
            0.3 * randn(2, shape[1], seed=2 * seed),
            0.3 * randn(shape[0], 2, seed=2 * seed + 1),
        )
        tensors |= {f"{stem}.{suffixes[0]}": down, f"{stem}.{suffixes[1]}": up}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        changes[f"{path}.weight"] = (alpha or 2) / 2 * up @ down
    return tensors, changes


@torch.no_grad()
def assert_drawn_as_changed_by_hand(
    model: nn.Module,
    draw: Callable[[nn.Module], Tensor],
    tensors: dict[str, Tensor],
    changes: dict[str, Tensor],
    mode: Mode,
    folder: Path,
) -> None:
    by_hand = copy.deepcopy(model)
    for name, change in changes.items():
        by_hand.get_parameter(name).add_(change, alpha=0.5)
    engine = LoraEngine({"transformer": model})
    file = bind(engine, folder, tensors)
    assert file.unused == ()
    plain, expected = draw(model), draw(by_hand)
    with unchanged(model), engine.applied([LoraUse(file, 0.5)], mode):
        assert relative_error(draw(model), expected) < 1e-5
    assert torch.equal(draw(model), plain)
    assert relative_error(plain, expected) > 0.01


PEFT, KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
FLUX_PATHS = [
    "x_embedder",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.0.norm1.linear",
    "single_transformer_blocks.0.attn.to_v",
    "single_transformer_blocks.0.proj_mlp",
    "single_transformer_blocks.0.proj_out",
    "proj_out",
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "suffixes", "alpha"),
    [
        (lambda path: f"transformer.{path}", PEFT, None),
        (lambda path: f"transformer.{path}", KOHYA, 1.0),
        (lambda path: path, PEFT, None),
        (lambda path: f"base_model.model.{path}", PEFT, None),
        (lambda path: "lora_transformer_" + path.replace(".", "_"), KOHYA, 3.0),
        (lambda path: "lycoris_" + path.replace(".", "_"), KOHYA, 3.0),
    ],
    ids=["transformer.", "transformer. kohya", "bare", "peft", "lora_transformer_", "lycoris_"],
)
def test_flux_draws_as_if_changed_by_hand(
    name: Callable[[str], str],
    suffixes: tuple[str, str],
    alpha: float | None,
    mode: Mode,
    flux: nn.Module,
    tmp_path: Path,
) -> None:
    names = {name(path): path for path in FLUX_PATHS}
    tensors, changes = low_rank(flux, names, suffixes, alpha)
    assert_drawn_as_changed_by_hand(flux, draw_flux, tensors, changes, mode, tmp_path)


WAN_NAMES = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.0.self_attn.o": "blocks.0.attn1.to_out.0",
    "blocks.1.cross_attn.k": "blocks.1.attn2.to_k",
    "blocks.1.cross_attn.v": "blocks.1.attn2.to_v",
    "blocks.1.cross_attn.k_img": "blocks.1.attn2.add_k_proj",
    "blocks.1.cross_attn.v_img": "blocks.1.attn2.add_v_proj",
    "blocks.0.ffn.0": "blocks.0.ffn.net.0.proj",
    "blocks.0.ffn.2": "blocks.0.ffn.net.2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
}
WAN_IMAGE_NAMES = {
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
}
WAN_DIFFERENCES = {
    "blocks.0.diff_m": "blocks.0.scale_shift_table",
    "head.diff_m": "scale_shift_table",
    "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
    "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
    "blocks.1.cross_attn.norm_k.diff": "blocks.1.attn2.norm_k.weight",
    "blocks.1.norm3.diff": "blocks.1.norm2.weight",
    "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
    "patch_embedding.diff": "patch_embedding.weight",
    "head.head.diff_b": "proj_out.bias",
}


def differences(
    model: nn.Module, prefix: str, names: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    changes = {
        p: 0.3 * randn(*model.get_parameter(p).shape, seed=i) for i, p in enumerate(names.values())
    }
    return {prefix + key: changes[path] for key, path in names.items()}, changes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "suffixes", "alpha"),
    [
        ("diffusion_model.{}", PEFT, None),
        ("diffusion_model.{}", KOHYA, 1.0),
        ("model.diffusion_model.{}", PEFT, None),
        ("lora_unet_{}", KOHYA, 4.0),
    ],
)
def test_wan_draws_as_if_changed_by_hand(
    name: str,
    suffixes: tuple[str, str],
    alpha: float | None,
    mode: Mode,
    wan: nn.Module,
    tmp_path: Path,
) -> None:
    dotted = "." in name
    names = {name.format(n if dotted else n.replace(".", "_")): p for n, p in WAN_NAMES.items()}
    tensors, changes = low_rank(wan, names, suffixes, alpha)
    assert_drawn_as_changed_by_hand(wan, draw_wan, tensors, changes, mode, tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_wan_takes_the_image_embedders_names(mode: Mode, wan: nn.Module, tmp_path: Path) -> None:
    names = {f"diffusion_model.{n}": p for n, p in WAN_IMAGE_NAMES.items()}
    tensors, changes = low_rank(wan, names, PEFT, None)
    assert_drawn_as_changed_by_hand(wan, draw_wan, tensors, changes, mode, tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_wan_takes_lightx2vs_differences_beside_a_lora(
    mode: Mode, wan: nn.Module, tmp_path: Path
) -> None:
    names = {f"diffusion_model.{n}": p for n, p in WAN_NAMES.items()}
    tensors, changes = low_rank(wan, names, KOHYA, None)
    more, whole = differences(wan, "diffusion_model.", WAN_DIFFERENCES)
    assert_drawn_as_changed_by_hand(wan, draw_wan, tensors | more, changes | whole, mode, tmp_path)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("key", WAN_DIFFERENCES)
def test_wan_takes_each_difference_alone(
    key: str, mode: Mode, wan: nn.Module, tmp_path: Path
) -> None:
    tensors, changes = differences(wan, "diffusion_model.", {key: WAN_DIFFERENCES[key]})
    file = bind(LoraEngine({"transformer": wan}), tmp_path, tensors)
    assert file.unused == ()
    (layer,) = file.layers
    (path,) = changes
    assert ".".join(filter(None, (layer.target.path, layer.parameter))) == path
    engine = LoraEngine({"transformer": wan})
    before = wan.get_parameter(path).detach().clone()
    with unchanged(wan), engine.applied([LoraUse(file)], mode):
        assert relative_error(wan.get_parameter(path), before.double() + changes[path]) < 1e-6
