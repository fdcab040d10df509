"""The demo's four adapters: what each is trained on, and the trainer's layout that it is saved in.

peft trains them on the frozen base; the files are written here, key by key, in the form that the named
trainer writes, so that each is a fixture for one layout.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from demo import pictures
from demo.training import DEVICE, LORAS, MODEL, Base, Run, log, make_bank, random_phrase
from lora.formats.names.sgm import sgm_path

UNET_LAYERS = (
    r".*(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|conv1|conv2|conv)$"
)
TEXT_LAYERS = r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)$"


@dataclass(frozen=True)
class Adapter:
    """One adapter of the demo."""

    name: str
    trigger: str
    layout: Callable[[str, str, list[str]], str]
    """(component, module path, all paths of the component) -> the stem of the module's keys."""
    style: str | None = None
    shape: str | None = None
    loha: bool = False
    text_encoders: bool = False
    rank: int = 8
    alpha: float = 8.0

    @property
    def scenes(self) -> tuple[str, ...]:
        """The shapes of the pictures that it is trained on."""
        return (self.shape,) if self.shape else pictures.SHAPES

    def say(self, scene: pictures.Scene) -> str:
        """The prompt of a training picture; a style's trigger word stands in half of them."""
        phrase = random_phrase(scene)
        return f"{phrase}, {self.trigger}" if self.style and random.random() < 0.5 else phrase


def kohya_sgm(component: str, path: str, siblings: list[str]) -> str:
    """sd-scripts on SDXL: the original code's names with underscores."""
    return f"lora_unet_{sgm_path(path, siblings)}".replace(".", "_")


def kohya_blocks(component: str, path: str, siblings: list[str]) -> str:
    """OneTrainer (legacy) and others: diffusers' names with underscores, both text encoders."""
    prefix = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}[component]
    if component != "unet":
        path = "text_model." + path.removeprefix("text_model.")
    return f"lora_{prefix}_{path}".replace(".", "_")


def diffusers_names(component: str, path: str, siblings: list[str]) -> str:
    """diffusers' own training scripts."""
    return f"{component}.{path}"


def lycoris(component: str, path: str, siblings: list[str]) -> str:
    """LyCORIS' wrapper, as SimpleTuner uses it."""
    return f"lycoris_{path}".replace(".", "_")


ADAPTERS = {
    adapter.name: adapter
    for adapter in (
        Adapter("stripes", "stripes", kohya_sgm, style="stripes", alpha=4.0),
        Adapter("outline", "outline", diffusers_names, style="outline"),
        Adapter("night", "night", lycoris, style="night", loha=True, rank=4, alpha=4.0),
        Adapter(
            "spiral",
            "spiral",
            kohya_blocks,
            shape="spiral",
            text_encoders=True,
            rank=16,
            alpha=16.0,
        ),
    )
}


def load_base() -> Base:
    """The trained base, frozen, in float32."""
    base = Base(
        unet=UNet2DConditionModel.from_pretrained(MODEL / "unet").float().to(DEVICE),
        encoders=(
            CLIPTextModel.from_pretrained(MODEL / "text_encoder").float().to(DEVICE),
            CLIPTextModelWithProjection.from_pretrained(MODEL / "text_encoder_2")
            .float()
            .to(DEVICE),
        ),
        tokenizers=(
            CLIPTokenizer.from_pretrained(MODEL / "tokenizer"),
            CLIPTokenizer.from_pretrained(MODEL / "tokenizer_2"),
        ),
    )
    for part in (base.unet, *base.encoders):
        part.requires_grad_(False)
    return base


def train_adapter(adapter: Adapter, steps: int) -> None:
    """Trains one adapter on pictures in its style or shape, and saves it in its layout."""
    torch.manual_seed(4)
    random.seed(4)
    base = load_base()
    parts: dict[str, nn.Module] = {"unet": base.unet}
    if adapter.text_encoders:
        parts |= {"text_encoder": base.encoders[0], "text_encoder_2": base.encoders[1]}
    for component, part in parts.items():
        layers = UNET_LAYERS if component == "unet" else TEXT_LAYERS
        inject_adapter_in_model(_config(adapter, layers), part)
    bank = make_bank(3000, 11, *([adapter.style] if adapter.style else []), shapes=adapter.scenes)
    batches = bank.batches(32, adapter.say)

    def loss_of() -> Tensor:
        latents, prompts = next(batches)
        return base.loss(latents, base.tokens(prompts))

    trained = [p for part in parts.values() for p in part.parameters() if p.requires_grad]
    log.info("%s: %.2f M parameters", adapter.name, sum(p.numel() for p in trained) / 1e6)
    Run(adapter.name, steps, trained, 4e-3, average=0.98).train(loss_of)
    tensors = dict(t for name, part in parts.items() for t in _tensors(adapter, name, part))
    LORAS.mkdir(exist_ok=True)
    path = LORAS / f"demo-{adapter.name}.safetensors"
    save_file({k: v.half().contiguous() for k, v in tensors.items()}, path, _metadata(adapter))
    log.info("%s: %d tensors, %.2f MB", path.name, len(tensors), path.stat().st_size / 1e6)


def _config(adapter: Adapter, layers: str) -> LoraConfig | LoHaConfig:
    if adapter.loha:
        return LoHaConfig(r=adapter.rank, alpha=adapter.alpha, target_modules=layers)
    return LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=layers)


def _tensors(adapter: Adapter, component: str, part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The adapter's tensors of one component, each with its key."""
    found = [(n, m) for n, m in part.named_modules() if hasattr(m, "base_layer")]
    paths = [n.replace(".base_layer", "") for n, _ in part.named_modules()]
    for path, module in found:
        stem = adapter.layout(component, path, paths)
        if adapter.loha:
            for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"):
                yield f"{stem}.{name}", getattr(module, name)["default"].detach()
        elif adapter.layout is diffusers_names:
            yield f"{stem}.lora_A.weight", module.lora_A["default"].weight.detach()
            yield f"{stem}.lora_B.weight", module.lora_B["default"].weight.detach()
        else:
            yield f"{stem}.lora_down.weight", module.lora_A["default"].weight.detach()
            yield f"{stem}.lora_up.weight", module.lora_B["default"].weight.detach()
        if adapter.layout is not diffusers_names:  # diffusers keeps its alpha in the metadata
            yield f"{stem}.alpha", torch.tensor(adapter.alpha)


def _metadata(adapter: Adapter) -> dict[str, str]:
    """What trainers write into a file: kohya's ss_*, and the model spec."""
    tags = {f"10_{adapter.name}": {adapter.trigger: 3000}}
    config = {"unet.r": adapter.rank, "unet.lora_alpha": adapter.alpha}
    own = (
        {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
        if adapter.layout is diffusers_names
        else {
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_network_module": "lycoris.kohya" if adapter.loha else "networks.lora",
            "ss_network_dim": str(adapter.rank),
            "ss_network_alpha": str(adapter.alpha),
            "ss_network_args": json.dumps({"algo": "loha"} if adapter.loha else {}),
            "ss_output_name": f"demo-{adapter.name}",
            "ss_resolution": f"({pictures.SIDE}, {pictures.SIDE})",
            "ss_tag_frequency": json.dumps(tags),
            "ss_training_comment": "trained by demo/train.py on the embedded demo model",
        }
    )
    return {
        **own,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"demo-{adapter.name}",
        "modelspec.trigger_phrase": adapter.trigger,
        "modelspec.resolution": f"{pictures.SIDE}x{pictures.SIDE}",
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
