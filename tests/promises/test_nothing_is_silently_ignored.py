"""What other engines get wrong without a word, or refuse, on SDXL: here with the right answer.

Each case is a file as a trainer writes it. Every tensor of it must be used, every layer of the model must
become what the trainer's formula says, and all others must stay.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora.engine.engine import LoraEngine
from lora.engine.stack import LoraUse, Mode
from lora.errors import LoraIncompatible, LoraUnsupported
from lora.formats.names.keys import ALONE
from tests.adapters import (
    CONV_SGM,
    CONVOLUTION,
    CROSS_ATTENTION,
    CROSS_SGM,
    SELF_ATTENTION,
    SELF_SGM,
    randn,
    sd15,
)
from tests.lora.checks import bind, relative_error, snapshot

MODES = [Mode.DYNAMIC, Mode.MERGED]
UNET, TE1, TE2 = "unet", "text_encoder", "text_encoder_2"
KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")
NAMED = ("lora_A.default.weight", "lora_B.default.weight")
DOTTED = ("lora.down.weight", "lora.up.weight")
LINEAR_LAYER = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")
PROCESSOR = ("down.weight", "up.weight")


@pytest.fixture(scope="module")
def encoders() -> dict[str, nn.Module]:
    """SDXL's two text encoders, tiny: without and with `text_model.` in their modules' paths."""
    torch.manual_seed(1)
    options = {
        "vocab_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "projection_dim": 20,
    }
    options |= {"num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    first = CLIPTextModel(CLIPTextConfig(hidden_size=32, **options))
    second = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=24, **options))
    return {TE1: first.eval(), TE2: second.eval()}


@pytest.fixture(scope="module")
def components(_unet: nn.Module, encoders: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """One model for all of them: every test asserts that it leaves it as it was."""
    return {UNET: _unet, **encoders}


@dataclass(frozen=True)
class Pair:
    """A LoRA of one layer: how the file calls it, and which layer of the model it means."""

    stem: str
    component: str
    path: str
    suffixes: tuple[str, str] = KOHYA
    rank: int = 4
    alpha: float | None = None
    scaling: float | None = None
    """What the trainer multiplies with; alpha / rank, or 1 without one, if it is not given."""

    @property
    def factor(self) -> float:
        if self.scaling is not None:
            return self.scaling
        return self.alpha / self.rank if self.alpha else 1.0


def q(number: int, name: str = "q_proj", *, prefix: str = "") -> str:
    return f"{prefix}encoder.layers.{number}.self_attn.{name}"


def te(number: int, component: str, name: str = "q_proj") -> str:
    """A text encoder's layer by its path in transformers 5: only the second has `text_model.`."""
    return q(number, name, prefix="text_model." if component == TE2 else "")


SELF_UNDERSCORED = SELF_ATTENTION.replace(".", "_")
SGM_DOTTED = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
OUT_OLD = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora"
MLP = "text_model.encoder.layers.0.mlp.fc1"
SELF_OLD = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
TE_K = "text_model_encoder_layers_1_self_attn"

PAIRS: dict[str, list[Pair]] = {
    "an alpha of its own in each module": [
        Pair(SELF_SGM, UNET, SELF_ATTENTION, alpha=1.0),
        Pair(CROSS_SGM, UNET, CROSS_ATTENTION, rank=8, alpha=6.0),
        Pair(CONV_SGM, UNET, CONVOLUTION, rank=2, alpha=5.0),
        Pair("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", TE1, te(0, TE1), alpha=3.0),
        Pair(f"lora_te1_{TE_K}_k_proj", TE1, te(1, TE1, "k_proj"), rank=2, alpha=16.0),
    ],
    "an alpha in some modules only": [
        Pair(SELF_SGM, UNET, SELF_ATTENTION, alpha=1.0),
        Pair(CROSS_SGM, UNET, CROSS_ATTENTION),
        Pair(CONV_SGM, UNET, CONVOLUTION, alpha=2.0),
        Pair(f"lora_te1_{TE_K}_q_proj", TE1, te(1, TE1)),
    ],
    "alpha 0 is alpha = rank": [
        Pair(SELF_SGM, UNET, SELF_ATTENTION, alpha=0.0, scaling=1.0),
        Pair(f"lora_te2_{TE_K}_q_proj", TE2, te(1, TE2), alpha=0.0, scaling=1.0),
    ],
    "an alpha below one": [Pair(SELF_SGM, UNET, SELF_ATTENTION, alpha=0.5)],
    "many ranks without alpha": [
        Pair(SELF_SGM, UNET, SELF_ATTENTION, rank=1),
        Pair(CROSS_SGM, UNET, CROSS_ATTENTION, rank=7),
        Pair(CONV_SGM, UNET, CONVOLUTION, rank=3),
    ],
    "SGM and diffusers names in one file": [
        Pair(SELF_SGM, UNET, SELF_ATTENTION, alpha=2.0),
        Pair(f"lora_unet_{CROSS_ATTENTION.replace('.', '_')}", UNET, CROSS_ATTENTION, alpha=2.0),
        Pair(f"unet.{CONVOLUTION}", UNET, CONVOLUTION, PEFT),
    ],
    "a text encoder's attention without out_proj": [
        Pair(f"lora_te1_{TE_K}_{n}_proj", TE1, te(1, TE1, f"{n}_proj"), alpha=4.0) for n in "qkv"
    ]
    + [Pair(f"lora_te2_{TE_K}_{n}_proj", TE2, te(1, TE2, f"{n}_proj"), alpha=4.0) for n in "qkv"],
    "the embedding of size and crop": [
        Pair("lora_unet_add_embedding_linear_1", UNET, "add_embedding.linear_1", alpha=2.0),
        Pair("lora_unet_label_emb_0_2", UNET, "add_embedding.linear_2", alpha=2.0),
        Pair("lora_unet_time_embed_0", UNET, "time_embedding.linear_1", alpha=2.0),
    ],
    "the text projection alone": [
        Pair("lora_te2_text_projection", TE2, "text_projection", alpha=2.0)
    ],
    "the text projection of PEFT": [
        Pair("text_encoder_2.text_projection", TE2, "text_projection", PEFT)
    ],
    "the adapter's name in the key": [
        Pair(f"unet.{SELF_ATTENTION}", UNET, SELF_ATTENTION, NAMED),
        Pair(f"unet.{CONVOLUTION}", UNET, CONVOLUTION, NAMED),
        Pair(f"text_encoder.text_model.{q(0)}", TE1, te(0, TE1), NAMED),
    ],
    "OMI": [
        Pair(f"unet.{SGM_DOTTED}", UNET, SELF_ATTENTION, alpha=3.0),
        Pair("unet.input_blocks.1.0.in_layers.2", UNET, CONVOLUTION, alpha=3.0),
        Pair(f"clip_l.text_model.{q(0)}", TE1, te(0, TE1), alpha=3.0),
        Pair(f"clip_g.text_model.{q(1)}", TE2, te(1, TE2), alpha=3.0),
        Pair("clip_g.text_projection", TE2, "text_projection", alpha=3.0),
    ],
    "LyCORIS' wrapper": [
        Pair(f"lycoris_{SELF_UNDERSCORED}", UNET, SELF_ATTENTION, alpha=1.0),
        Pair(f"lycoris_{CONVOLUTION.replace('.', '_')}", UNET, CONVOLUTION, alpha=1.0),
    ],
    "diffusers": [
        Pair(f"unet.{SELF_ATTENTION}", UNET, SELF_ATTENTION, PEFT),
        Pair(f"unet.{OUT}", UNET, OUT, PEFT, alpha=8.0),
        Pair(f"text_encoder.text_model.{q(0)}", TE1, te(0, TE1), PEFT),
        Pair(f"text_encoder_2.text_model.{q(1)}", TE2, te(1, TE2), PEFT),
    ],
    "diffusers on transformers 5": [Pair(f"text_encoder.{q(0)}", TE1, te(0, TE1), PEFT)],
    "old diffusers": [
        Pair(f"unet.{SELF_OLD}", UNET, SELF_ATTENTION, PROCESSOR),
        Pair(f"unet.{OUT_OLD}", UNET, OUT, PROCESSOR),
        Pair(f"text_encoder.text_model.{q(0)}", TE1, te(0, TE1), LINEAR_LAYER),
        Pair(f"text_encoder.text_model.{q(1, 'to_k_lora')}", TE1, te(1, TE1, "k_proj"), PROCESSOR),
        Pair(
            "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
            TE2,
            "text_model.encoder.layers.0.mlp.fc1",
            LINEAR_LAYER,
        ),
    ],
    "diffusers' lora.down": [Pair(f"unet.{SELF_ATTENTION}", UNET, SELF_ATTENTION, DOTTED)],
    "bare attention processors": [
        Pair(SELF_OLD, UNET, SELF_ATTENTION, PROCESSOR),
        Pair(OUT_OLD, UNET, OUT, PROCESSOR),
    ],
    "the original's names behind diffusion_model": [
        Pair(f"diffusion_model.{SGM_DOTTED}", UNET, SELF_ATTENTION, alpha=2.0),
        Pair("diffusion_model.input_blocks.1.0.in_layers.2", UNET, CONVOLUTION, PEFT),
        Pair("diffusion_model.label_emb.0.0", UNET, "add_embedding.linear_1", PEFT),
        Pair(f"text_encoders.clip_l.transformer.text_model.{q(0)}", TE1, te(0, TE1)),
        Pair("text_encoders.clip_g.transformer.text_projection", TE2, "text_projection"),
    ],
    "PEFT": [
        Pair(f"base_model.model.{SELF_ATTENTION}", UNET, SELF_ATTENTION, PEFT),
        Pair(f"base_model.model.{CONVOLUTION}", UNET, CONVOLUTION, PEFT),
    ],
    "bare names": [
        Pair(SELF_ATTENTION, UNET, SELF_ATTENTION, PEFT),
        Pair(CONVOLUTION, UNET, CONVOLUTION, PEFT),
    ],
    "the text encoder of SD 1.5": [
        Pair("lora_te_text_model_encoder_layers_0_self_attn_q_proj", TE1, te(0, TE1), alpha=4.0)
    ],
}
"""What the file says -> the layers that it means."""


def tensors_of(pairs: list[Pair], components: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for seed, pair in enumerate(pairs):
        shape = components[pair.component].get_parameter(f"{pair.path}.weight").shape
        ones = (1,) * len(shape[2:])
        tensors[f"{pair.stem}.{pair.suffixes[0]}"] = randn(pair.rank, *shape[1:], seed=2 * seed)
        tensors[f"{pair.stem}.{pair.suffixes[1]}"] = randn(
            shape[0], pair.rank, *ones, seed=2 * seed + 1
        )
        if pair.alpha is not None:
            tensors[f"{pair.stem}.alpha"] = torch.tensor(pair.alpha)
    return tensors


def changes_of(
    pairs: list[Pair], tensors: Mapping[str, Tensor], scalings: Mapping[str, float] | None = None
) -> dict[tuple[str, str], Tensor]:
    """The changes that the pairs mean, in float64, by component and parameter."""
    found = {}
    for pair in pairs:
        down, up = (tensors[f"{pair.stem}.{suffix}"].double() for suffix in pair.suffixes)
        product = (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
        factor = (scalings or {}).get(pair.path, pair.factor)
        found[pair.component, f"{pair.path}.weight"] = factor * product
    return found


def assert_applied(
    components: Mapping[str, nn.Module],
    folder: Path,
    tensors: Mapping[str, Tensor],
    changes: Mapping[tuple[str, str], Tensor],
    mode: Mode,
    config: str | None = None,
) -> None:
    """These changes and no others, from the whole of the file; afterwards none."""
    engine = LoraEngine(components)
    file = bind(engine, folder, tensors, config)
    assert file.unused == ()
    before = snapshot(components)
    with torch.no_grad(), engine.applied([LoraUse(file, 1.0)], mode):
        for (component, name), value in snapshot(components).items():
            change = changes.get((component, name))
            module = components[component].get_submodule(name.rpartition(".")[0])
            aside = mode is Mode.DYNAMIC and isinstance(module, (nn.Linear, nn.Conv2d))
            if change is None or (aside and torch.equal(value, before[component, name])):
                assert torch.equal(value, before[component, name])
            else:
                assert relative_error(value, before[component, name].double() + change) < 1e-6
        for component, name in changes:
            _assert_output(components, before, changes, component, name.rpartition(".")[0])
    after = snapshot(components)
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []
    assert not any("forward" in m.__dict__ for root in components.values() for m in root.modules())


def _assert_output(
    components: Mapping[str, nn.Module],
    before: Mapping[tuple[str, str], Tensor],
    changes: Mapping[tuple[str, str], Tensor],
    component: str,
    path: str,
) -> None:
    module = components[component].get_submodule(path)
    new = {
        name: before[component, f"{path}.{name}"].double()
        + changes.get((component, f"{path}.{name}"), 0.0)
        for name, _ in module.named_parameters(recurse=False)
    }
    bias = new.get("bias")
    if isinstance(module, nn.Conv2d):
        x = randn(2, module.in_channels, 4, 4, seed=50)
        expected = nn.functional.conv2d(x.double(), new["weight"], bias, padding=module.padding)
    elif isinstance(module, nn.Linear):
        x = randn(2, 3, module.in_features, seed=50)
        expected = nn.functional.linear(x.double(), new["weight"], bias)
    else:
        return
    assert relative_error(module(x), expected) < 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", PAIRS)
def test_every_key_means_its_layer_with_its_own_scaling(
    case: str, mode: Mode, components: dict[str, nn.Module], tmp_path: Path
) -> None:
    if ALONE in PAIRS[case][0].stem:  # a model with two text encoders has none of that name
        components = {name: own for name, own in components.items() if name != TE2}
    tensors = tensors_of(PAIRS[case], components)
    assert_applied(components, tmp_path, tensors, changes_of(PAIRS[case], tensors), mode)


# --- scalings that only a config knows --------------------------------------------------------------

CONFIG = {
    "r": 4,
    "lora_alpha": 8,
    "rank_pattern": {CROSS_ATTENTION: 2},
    "alpha_pattern": {"attn2.to_k": 5, "resnets.0.conv1": 1},
}


@pytest.mark.parametrize("rs_lora", [False, True])
@pytest.mark.parametrize("prefix", ["base_model.model.", "unet.", ""])
def test_a_peft_folders_config_gives_alphas_by_pattern(
    prefix: str, rs_lora: bool, components: dict[str, nn.Module], tmp_path: Path
) -> None:
    pairs = [
        Pair(prefix + SELF_ATTENTION, UNET, SELF_ATTENTION, PEFT),
        Pair(prefix + CROSS_ATTENTION, UNET, CROSS_ATTENTION, PEFT, rank=2),
        Pair(prefix + CONVOLUTION, UNET, CONVOLUTION, PEFT),
    ]
    root = {SELF_ATTENTION: 4, CROSS_ATTENTION: 2, CONVOLUTION: 4}
    alphas = {SELF_ATTENTION: 8, CROSS_ATTENTION: 5, CONVOLUTION: 1}
    scalings = {p: alphas[p] / (root[p] ** 0.5 if rs_lora else root[p]) for p in root}
    tensors = tensors_of(pairs, components)
    config = json.dumps({**CONFIG, "use_rslora": rs_lora})
    changes = changes_of(pairs, tensors, scalings)
    assert_applied(components, tmp_path, tensors, changes, Mode.MERGED, config)


def test_diffusers_metadata_has_a_config_for_each_component(
    components: dict[str, nn.Module], tmp_path: Path
) -> None:
    pairs = [
        Pair(f"unet.{SELF_ATTENTION}", UNET, SELF_ATTENTION, PEFT),
        Pair(f"text_encoder.text_model.{q(0)}", TE1, te(0, TE1), PEFT),
        Pair(f"text_encoder_2.text_model.{q(0)}", TE2, te(0, TE2), PEFT),
    ]
    numbers = {"unet.lora_alpha": 2, "unet.r": 4, "text_encoder.lora_alpha": 6, "text_encoder.r": 4}
    tensors = tensors_of(pairs, components)
    engine = LoraEngine(components)
    metadata = {"lora_adapter_metadata": json.dumps(numbers)}
    file = bind(engine, tmp_path, tensors, metadata=metadata)
    before = snapshot(components)
    changes = changes_of(pairs, tensors, {SELF_ATTENTION: 0.5, te(0, TE1): 1.5, te(0, TE2): 1.0})
    with engine.applied([LoraUse(file)], Mode.MERGED):
        now = snapshot(components)
        for key, change in changes.items():
            assert relative_error(now[key], before[key].double() + change) < 1e-6


# --- algorithms that others refuse or drop ----------------------------------------------------------


Formula = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""A module's original parameters -> the changed ones, in float64."""


@dataclass(frozen=True)
class Kind:
    """An algorithm's tensors for one layer, and what they make of its parameters."""

    path: str
    tensors: Mapping[str, Tensor]
    new: Formula
    stem: str = ""
    """LyCORIS' name for the layer, if it is not given."""


def weight(formula: Callable[[Tensor], Tensor]) -> Formula:
    return lambda old: {"weight": formula(old["weight"])}


def both(formula: Callable[[Tensor], Tensor]) -> Formula:
    return lambda old: {"weight": formula(old["weight"]), "bias": old["bias"] + BIAS.double()}


def dora(merged: Tensor, magnitude: Tensor, dim: int) -> Tensor:
    return magnitude.double() * merged / merged.square().sum(dim, keepdim=True).sqrt()


def cayley(blocks: Tensor) -> Tensor:
    skew = blocks.double() - blocks.double().transpose(1, 2)
    one = torch.eye(blocks.shape[-1], dtype=torch.float64)
    return torch.block_diag(*(((one + s) @ torch.linalg.inv(one - s)).T for s in skew))


def wide(first: Tensor, *others: Tensor) -> Tensor:
    """The product of matrices in float64."""
    total = first.double()
    for other in others:
        total = total @ other.double()
    return total


ALPHA, DOWN, UP = torch.tensor(2.0), randn(4, 64, seed=1), randn(64, 4, seed=2)
FACTORS = {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": ALPHA}
PRODUCT = 0.5 * wide(UP, DOWN)
LEFT, RIGHT = randn(64, 4, seed=3), randn(4, 64, seed=4)
SMALL, SQUARE = randn(8, 8, seed=5), randn(8, 8, seed=6)
BLOCKS, MAGNITUDE = 0.2 * randn(16, 4, 4, seed=7), randn(64, 1, seed=8).abs() + 1
FULL, BIAS, VECTOR = randn(64, 64, seed=9), randn(64, seed=10), randn(64, seed=11)
CONV_DOWN, CONV_UP, MID = randn(2, 32, seed=12), randn(32, 2, seed=13), randn(2, 2, 3, 3, seed=14)
NORM = "down_blocks.1.attentions.0.transformer_blocks.0.norm1"


def tucker(base: Tensor) -> Tensor:
    whole = base.clone()
    for y in range(3):
        for x in range(3):
            whole[:, :, y, x] += wide(CONV_UP, MID[:, :, y, x], CONV_DOWN)
    return whole


def sparse(base: Tensor) -> Tensor:
    whole = base + PRODUCT
    whole[0, 5] += 0.5 * BIAS[0].double()
    whole[63, 7] += 0.5 * BIAS[1].double()
    return whole


def kronecker(base: Tensor) -> Tensor:
    whole = base.clone()
    for row in range(8):
        for column in range(8):
            block = whole[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            block += SMALL[row, column].double() * SQUARE.double()
    return whole


KINDS: dict[str, Kind] = {
    "Tucker": Kind(
        CONVOLUTION,
        {
            "lora_down.weight": CONV_DOWN[:, :, None, None],
            "lora_up.weight": CONV_UP[:, :, None, None],
            "lora_mid.weight": MID,
        },
        weight(tucker),
        CONV_SGM,
    ),
    "LoHa": Kind(
        SELF_ATTENTION,
        {"hada_w1_a": UP, "hada_w1_b": DOWN, "hada_w2_a": LEFT, "hada_w2_b": RIGHT, "alpha": ALPHA},
        weight(lambda w: w + PRODUCT * wide(LEFT, RIGHT)),
    ),
    "LoKr": Kind(
        SELF_ATTENTION,
        {"lokr_w1": SMALL, "lokr_w2": SQUARE, "alpha": torch.tensor(9999999999.0)},
        weight(kronecker),
    ),
    "DoRA of the outputs": Kind(
        SELF_ATTENTION,
        {**FACTORS, "dora_scale": MAGNITUDE},
        weight(lambda w: dora(w + PRODUCT, MAGNITUDE, 1)),
    ),
    "DoRA of the inputs": Kind(
        SELF_ATTENTION,
        {**FACTORS, "dora_scale": MAGNITUDE.T.contiguous()},
        weight(lambda w: dora(w + PRODUCT, MAGNITUDE.T, 0)),
        SELF_SGM,
    ),
    "DoRA of PEFT": Kind(
        SELF_ATTENTION,
        {"lora_A.weight": DOWN, "lora_B.weight": UP, "lora_magnitude_vector": MAGNITUDE.flatten()},
        weight(lambda w: dora(w + 2 * PRODUCT, MAGNITUDE, 1)),
        f"unet.{SELF_ATTENTION}",
    ),
    "OFT of sd-scripts": Kind(
        SELF_ATTENTION,
        {"oft_blocks": BLOCKS, "alpha": torch.tensor(100.0)},
        weight(lambda w: cayley(BLOCKS) @ w),
        SELF_SGM.replace("lora_", "oft_"),
    ),
    "OFT of LyCORIS": Kind(
        SELF_ATTENTION,
        {"oft_blocks": BLOCKS, "rescale": MAGNITUDE, "alpha": torch.tensor(0)},
        weight(lambda w: MAGNITUDE.double() * (cayley(BLOCKS) @ w)),
    ),
    "GLoRA": Kind(
        SELF_ATTENTION,
        {"a1.weight": LEFT, "a2.weight": RIGHT, "b1.weight": UP, "b2.weight": DOWN, "alpha": ALPHA},
        weight(lambda w: w + 0.5 * wide(w, LEFT, RIGHT) + PRODUCT),
    ),
    "IA3": Kind(
        SELF_ATTENTION,
        {"weight": VECTOR, "on_input": torch.tensor(1)},
        weight(lambda w: w * (1 + VECTOR.double())),
    ),
    "diff and diff_b": Kind(OUT, {"diff": FULL, "diff_b": BIAS}, both(lambda w: w + FULL.double())),
    "w_norm and b_norm": Kind(
        NORM, {"w_norm": VECTOR, "b_norm": BIAS}, both(lambda w: w + VECTOR.double())
    ),
    "set_weight": Kind(SELF_ATTENTION, {"set_weight": FULL}, weight(lambda _: FULL.double())),
    "a sparse rest": Kind(
        SELF_ATTENTION,
        {
            **FACTORS,
            "bias_indices": torch.tensor([[0, 63], [5, 7]], dtype=torch.int16),
            "bias_values": BIAS[:2].clone(),
            "bias_size": torch.tensor([64, 64], dtype=torch.int16),
        },
        weight(sparse),
    ),
    "LoRA and diff_b on one layer": Kind(
        OUT, {**FACTORS, "diff_b": BIAS}, both(lambda w: w + PRODUCT)
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", KINDS)
def test_every_algorithm_is_applied_as_its_trainer_has_it(
    name: str, mode: Mode, components: dict[str, nn.Module], tmp_path: Path
) -> None:
    kind = KINDS[name]
    stem = kind.stem or "lycoris_" + kind.path.replace(".", "_")
    module = components[UNET].get_submodule(kind.path)
    old = {n: p.detach().double() for n, p in module.named_parameters(recurse=False)}
    changes = {
        (UNET, f"{kind.path}.{parameter}"): new - old[parameter]
        for parameter, new in kind.new({n: p.clone() for n, p in old.items()}).items()
    }
    tensors = {f"{stem}.{suffix}": tensor for suffix, tensor in kind.tensors.items()}
    assert_applied(components, tmp_path, tensors, changes, mode)


def test_embeddings_in_the_file_are_read_and_the_rest_is_applied(
    components: dict[str, nn.Module], tmp_path: Path
) -> None:
    pairs = [Pair(SELF_SGM, UNET, SELF_ATTENTION)]
    tensors = tensors_of(pairs, components)
    tensors |= {"bundle_emb.word.clip_l": randn(2, 32), "bundle_emb.word.clip_g": randn(2, 24)}
    file = bind(LoraEngine(components), tmp_path, tensors)
    assert file.unused == ()
    assert {(e.word, e.component) for e in file.embeddings} == {("word", TE1), ("word", TE2)}
    assert_applied(components, tmp_path, tensors, changes_of(pairs, tensors), Mode.MERGED)


# --- what must be said ------------------------------------------------------------------------------


def test_a_part_for_a_component_that_is_missing_is_listed_and_the_rest_applied(
    unet: nn.Module, components: dict[str, nn.Module], tmp_path: Path
) -> None:
    tensors = tensors_of(PAIRS["OMI"], components)
    file = bind(LoraEngine({UNET: unet}), tmp_path, tensors)
    assert {one.key for one in file.unused} == {key for key in tensors if key.startswith("clip_")}
    assert {one.reason for one in file.unused} == {
        "this model has no text_encoder",
        "this model has no text_encoder_2",
    }
    assert file.modules == 2


FLUX = {
    "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": randn(4, 64),
    "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": randn(64, 4),
}
FLUX_DIFFUSERS = {
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": randn(4, 64),
    "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": randn(64, 4),
}
T_LORA = {
    f"{SELF_SGM}.{n}": randn(4, 4) for n in ("q_layer.weight", "p_layer.weight", "lambda_layer")
}


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        (sd15(), LoraIncompatible),
        (FLUX, LoraIncompatible),
        (FLUX_DIFFUSERS, LoraIncompatible),
        (T_LORA, LoraUnsupported),
        ({f"{SELF_SGM}.reshape_weight": torch.tensor([80, 64])}, LoraUnsupported),
        ({f"{SELF_SGM}.lora_down.weight": DOWN}, LoraUnsupported),
    ],
    ids=["SD 1.5", "Flux", "Flux of diffusers", "T-LoRA", "reshape_weight", "half a pair"],
)
def test_a_file_that_cannot_be_applied_is_refused(
    tensors: dict[str, Tensor],
    error: type[Exception],
    components: dict[str, nn.Module],
    tmp_path: Path,
) -> None:
    with pytest.raises(error):
        bind(LoraEngine(components), tmp_path, tensors)
