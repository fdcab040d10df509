"""Our changes against the trainers' own forward, which is what the network learned with.

Their merges are no reference: LyCORIS' applies the scaling of LoHa and LoKr twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lycoris.modules import (
    ButterflyOFTModule,
    DiagOFTModule,
    FullModule,
    GLoRAModule,
    IA3Module,
    LoConModule,
    LohaModule,
    LokrModule,
    NormModule,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from lora.engine.engine import LoraEngine
from lora.engine.stack import LoraUse, Mode
from tests.adapters import randn
from tests.lora.checks import bind, relative_error
from tests.state import unchanged

LIMIT = 1e-6

# PEFT's own check takes every bias of its lora_B for a matrix.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'")


def randomise(parameters: list[tuple[str, nn.Parameter]], spread: float = 0.3) -> None:
    """Weights that no trainer starts with: none is zero, none is the identity."""
    with torch.no_grad():
        for seed, (_, parameter) in enumerate(sorted(parameters, key=lambda one: one[0])):
            noise = randn(parameter.numel(), seed=100 + seed).reshape(parameter.shape)
            parameter.copy_(parameter + spread * noise)


# --- LyCORIS ----------------------------------------------------------------------------------------

LINEAR, CONV, CONV_1X1 = "linear", "conv", "conv 1x1"
LAYERS: dict[str, Callable[[], nn.Module]] = {
    LINEAR: lambda: nn.Linear(12, 16),
    "linear square": lambda: nn.Linear(16, 16, bias=False),
    CONV: lambda: nn.Conv2d(8, 16, 3, padding=1, stride=2),
    CONV_1X1: lambda: nn.Conv2d(8, 16, 1),
    "layer norm": lambda: nn.LayerNorm(16),
    "group norm": lambda: nn.GroupNorm(4, 16),
}
INPUTS = {LINEAR: (3, 12), CONV: (2, 8, 6, 6), CONV_1X1: (2, 8, 6, 6), "group norm": (2, 16, 5, 5)}
BOTH = (LINEAR, CONV)


@dataclass(frozen=True)
class Case:
    """One of LyCORIS' modules, its options, and the layers to put it on."""

    module: type[nn.Module]
    layers: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    linear: bool = True
    """Whether its multiplier k means W + k * (W' - W), as ours does."""

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.module.__name__}({options})"


def decomposed(**options: Any) -> list[dict[str, Any]]:
    return [{**options, "weight_decompose": True, "wd_on_out": side} for side in (True, False)]


LORA_OPTIONS = [{}, {"alpha": 0}, {"rs_lora": True}, {"use_scalar": True}]
LOKR_OPTIONS = [
    {"lora_dim": 1},
    {"lora_dim": 1, "decompose_both": True},
    {"lora_dim": 1, "factor": 2, "rs_lora": True, "alpha": 3},
    {"lora_dim": 1, "unbalanced_factorization": True},
    {"lora_dim": 100},
    {"full_matrix": True, "factor": 4},
]
OFT_OPTIONS = [{}, {"constraint": 0.01}, {"constraint": 50.0}]
CASES = [
    *(Case(LoConModule, (*BOTH, CONV_1X1), options) for options in LORA_OPTIONS),
    Case(LoConModule, (CONV,), {"use_tucker": True}),
    *(Case(LoConModule, BOTH, options, linear=False) for options in decomposed()),
    *(Case(LoConModule, ("linear square",), options, linear=False) for options in decomposed()),
    *(Case(LoConModule, (CONV,), o, linear=False) for o in decomposed(use_tucker=True)),
    *(Case(LohaModule, (*BOTH, CONV_1X1), options) for options in LORA_OPTIONS),
    Case(LohaModule, (CONV,), {"use_tucker": True}),
    *(Case(LohaModule, BOTH, options, linear=False) for options in decomposed()),
    *(Case(LokrModule, BOTH, options) for options in LOKR_OPTIONS),
    Case(LokrModule, (CONV,), {"use_tucker": True, "lora_dim": 2, "factor": 2}),
    Case(LokrModule, (CONV,), {"use_tucker": True, "lora_dim": 1, "decompose_both": True}),
    *(Case(LokrModule, BOTH, options, linear=False) for options in decomposed(lora_dim=1)),
    *(Case(DiagOFTModule, BOTH, options) for options in OFT_OPTIONS),
    Case(DiagOFTModule, BOTH, {"rescaled": True, "constraint": 0.01}, linear=False),
    *(Case(ButterflyOFTModule, BOTH, options, linear=False) for options in OFT_OPTIONS),
    Case(ButterflyOFTModule, BOTH, {"rescaled": True, "lora_dim": 8}, linear=False),
    Case(GLoRAModule, (*BOTH, CONV_1X1)),
    *(Case(IA3Module, BOTH, {"train_on_input": side}) for side in (True, False)),
    Case(FullModule, BOTH),
    Case(NormModule, ("layer norm", "group norm")),
]


@pytest.mark.parametrize(
    ("case", "layer", "scale"),
    [
        pytest.param(case, layer, scale, id=f"{case}-{layer}-{scale}")
        for case in CASES
        for layer in case.layers
        for scale in ((1.0, 0.5) if case.linear else (1.0,))
    ],
)
def test_merged_output_equals_the_forward_of_lycoris(
    case: Case, layer: str, scale: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    root = nn.Sequential(LAYERS[layer]())
    randomise(list(root.named_parameters()))
    options = {"lora_dim": 4, "alpha": 2, **case.options}
    trained = case.module("lora", copy.deepcopy(root[0]), scale, **options).eval()
    if case.module is FullModule:
        trained.apply_to()  # takes the weight off the layer; before that its state is no difference
    randomise(list(trained.named_parameters()))
    tensors = {
        f"lycoris_0.{name}": value.detach().clone().contiguous()
        for name, value in trained.state_dict().items()
    }
    x = randn(*INPUTS.get(layer, (3, 16)), seed=7)
    with torch.no_grad():
        expected, plain = trained(x), root(x)
    engine = LoraEngine({"unet": root})
    file = bind(engine, tmp_path, tensors)
    assert file.unused == ()
    with (
        torch.no_grad(),
        unchanged(root),
        engine.applied([LoraUse(file, scale)], Mode.MERGED),
    ):
        assert relative_error(root(x), expected) < LIMIT
    assert relative_error(plain, expected) > 0.001


# --- PEFT -------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Every kind of layer that PEFT changes, with names that repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.mix = nn.Conv2d(8, 8, 1)
        self.norm = nn.GroupNorm(2, 8)
        self.block = nn.ModuleDict({"first": nn.Linear(8, 12), "second": nn.Linear(12, 8)})
        self.last = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.mix(torch.tanh(self.conv(x)))).flatten(2).transpose(1, 2)
        x = torch.tanh(self.block["first"](x))
        return self.head(self.last(torch.tanh(self.block["second"](x))))


LINEARS = ["block.first", "block.second", "last"]
ALL = [*LINEARS, "conv", "mix"]
BIASED = ["block.first", "block.second", "conv"]
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ALL, "init_lora_weights": False}
PATTERNS = {
    "rank_pattern": {"block.first": 2, "(last|mix)": 3},
    "alpha_pattern": {"first": 5, r"block\.s.*": 1, "conv": 8},
}
ANCHORED = {
    "rank_pattern": {"^last": 3},
    "alpha_pattern": {"^last": 1, "^block.first": 2},
}
LYCORIS = {"r": 2, "alpha": 3, "init_weights": False, "target_modules": ALL}
OFT = {"r": 0, "oft_block_size": 4, "init_weights": False, "target_modules": [*LINEARS, "mix"]}
CONFIGS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(**LORA),
    "lora rslora": peft.LoraConfig(**LORA, use_rslora=True),
    "lora dora": peft.LoraConfig(**LORA, use_dora=True),
    "lora dora rslora patterns": peft.LoraConfig(
        **LORA, use_dora=True, use_rslora=True, **PATTERNS
    ),
    "lora bias of lora_B": peft.LoraConfig(**{**LORA, "target_modules": BIASED}, lora_bias=True),
    "lora patterns": peft.LoraConfig(**LORA, **PATTERNS),
    "lora anchored patterns": peft.LoraConfig(**LORA, **ANCHORED),
    "lora biases trained": peft.LoraConfig(**LORA, bias="all"),
    "lora biases of its layers trained": peft.LoraConfig(**LORA, bias="lora_only"),
    "lora modules_to_save": peft.LoraConfig(**LORA, modules_to_save=["head", "norm"]),
    "loha": peft.LoHaConfig(**LYCORIS),
    "loha patterns": peft.LoHaConfig(**LYCORIS, **PATTERNS),
    "loha tucker": peft.LoHaConfig(**LYCORIS, use_effective_conv2d=True),
    "lokr": peft.LoKrConfig(**LYCORIS),
    "lokr whole": peft.LoKrConfig(**{**LYCORIS, "r": 50}),
    "lokr both": peft.LoKrConfig(**{**LYCORIS, "r": 1}, decompose_both=True, decompose_factor=4),
    "lokr tucker": peft.LoKrConfig(
        **{**LYCORIS, "r": 1}, use_effective_conv2d=True, decompose_factor=2
    ),
    "oft": peft.OFTConfig(**OFT),
    "oft shared": peft.OFTConfig(**OFT, block_share=True),
    "oft exact": peft.OFTConfig(**OFT, use_cayley_neumann=False),
    "oft 3 terms": peft.OFTConfig(**OFT, num_cayley_neumann_terms=3),
    "oft constrained": peft.OFTConfig(**OFT, coft=True, eps=0.1),
    "ia3": peft.IA3Config(target_modules=ALL, feedforward_modules=[], init_ia3_weights=False),
    "ia3 without biases": peft.IA3Config(
        target_modules=["last"], feedforward_modules=[], init_ia3_weights=False
    ),
    "ia3 of inputs": peft.IA3Config(
        target_modules=ALL, feedforward_modules=["block.second", "conv"], init_ia3_weights=False
    ),
    "ia3 of inputs of a square convolution": peft.IA3Config(
        target_modules=["mix"], feedforward_modules=["mix"], init_ia3_weights=False
    ),
}
PREFIXES = ("lora_", "hada_", "lokr_", "oft_", "ia3_", "modules_to_save", "bias")


@pytest.mark.parametrize("mode", [Mode.DYNAMIC, Mode.MERGED])
@pytest.mark.parametrize("name", CONFIGS)
def test_output_equals_the_forward_of_peft(name: str, mode: Mode, tmp_path: Path) -> None:
    torch.manual_seed(0)
    root = Net().eval()
    randomise(list(root.named_parameters()))
    trained = peft.get_peft_model(copy.deepcopy(root), CONFIGS[name]).eval()
    learned = [(n, p) for n, p in trained.named_parameters() if p.requires_grad]
    assert all(any(prefix in n for prefix in PREFIXES) for n, _ in learned)
    randomise(learned, 0.2)
    trained.save_pretrained(tmp_path / "peft")
    x = randn(2, 4, 5, 5, seed=7)
    with torch.no_grad():
        expected, plain = trained(x), root(x)
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    config = (tmp_path / "peft" / "adapter_config.json").read_text()
    engine = LoraEngine({"unet": root})
    file = bind(engine, tmp_path, tensors, config)
    assert file.unused == ()
    with torch.no_grad(), unchanged(root), engine.applied([LoraUse(file)], mode):
        assert relative_error(root(x), expected) < LIMIT
    assert relative_error(plain, expected) > 0.001
