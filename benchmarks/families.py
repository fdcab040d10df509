"""Adapters of every family of models, given to SDXL: `python -m benchmarks.families`.

Each file is made from the shapes of the family's own network on the `meta` device, in every naming and every
algorithm, with zeros for numbers. It must be refused, with its family's name, and SDXL's own must be used to
the last tensor. Writes the table of docs/formats.md; the exit code is 1 if a file is judged wrongly.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import (
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import fill_in
from lora.errors import LoraError
from lora.formats.adapter import load
from lora.formats.names.sgm import SD_BLOCKS, SDXL_BLOCKS, Blocks, sgm_path
from lora.formats.names.wan import wan_path
from lora.tools.adapters.known import UNET, sdxl_key_map

Shape = tuple[int, ...]

PAGE = "formats.md"

_JOINT = (
    (r"^transformer_blocks\.(\d+)\.norm1_context\.linear", r"{t}_mod.{lin}"),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear", r"{i}_mod.{lin}"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_q", r"{i}_attn{s}qkv"),
    (r"^transformer_blocks\.(\d+)\.attn\.add_q_proj", r"{t}_attn{s}qkv"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0", r"{i}_attn{s}proj"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_add_out", r"{t}_attn{s}proj"),
    (r"^transformer_blocks\.(\d+)\.ff\.(?:net\.0\.proj|linear_in)", r"{i}_mlp.{a}"),
    (r"^transformer_blocks\.(\d+)\.ff\.(?:net\.2|linear_out)", r"{i}_mlp.{b}"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.(?:net\.0\.proj|linear_in)", r"{t}_mlp.{a}"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.(?:net\.2|linear_out)", r"{t}_mlp.{b}"),
)
_SINGLE = (
    (r"^single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
    (
        r"^single_transformer_blocks\.(\d+)\.attn\.to_(?:q$|qkv_mlp_proj)",
        r"single_blocks.\1.linear1",
    ),
)


def _flux(separator: str, linear: str, ends: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    words = {"s": separator, "lin": linear, "a": ends[0], "b": ends[1]}
    double = {"i": r"double_blocks.\1.img", "t": r"double_blocks.\1.txt"}
    modulation = (
        r"^single_transformer_blocks\.(\d+)\.norm\.linear",
        rf"single_blocks.\1.modulation.{linear}",
    )
    return (*((a, b.format(**double, **words)) for a, b in _JOINT), *_SINGLE, modulation)


_SD3 = tuple(
    (
        a,
        b.format(
            i="joint_blocks.\\1.x", t="joint_blocks.\\1.context", s=".", lin="1", a="fc1", b="fc2"
        )
        .replace("_attn", "_block.attn")
        .replace("_mlp", "_block.mlp")
        .replace("_mod", "_block.adaLN_modulation"),
    )
    for a, b in _JOINT
)
_LUMINA = (
    (r"\.(?:attn|attention)\.to_q$", ".attention.qkv"),
    (r"\.(?:attn|attention)\.to_out\.0", ".attention.out"),
    (r"feed_forward\.linear_", "feed_forward.w"),
    (r"norm1\.linear", "adaLN_modulation.1"),
)
_FUSED = (
    r"attn\.to_[kv]$|attn\.add_[kv]_proj$|attention\.to_[kv]$|single_transformer_blocks.*proj_mlp$"
)


def _renamed(rules: tuple[tuple[str, str], ...]) -> Callable[[str], str | None]:
    """A path's name in a model's own code, where several matrices are one; None for those that are within."""

    def rename(path: str) -> str | None:
        if re.search(_FUSED, path):
            return None
        for pattern, name in rules:
            renamed, count = re.subn(pattern, name, path)
            if count:
                path = renamed
        return path

    return rename


def _sgm(blocks: Blocks) -> Callable[[str], str | None]:
    return lambda path: sgm_path(path, blocks)


@dataclass(frozen=True)
class Family:
    """A family of models."""

    name: str
    network: Callable[[], nn.Module]
    original: Callable[[str], str | None]
    """diffusers' path -> the path in the model's own code."""
    component: str = "transformer"
    encoder: tuple[str, int] | None = ("lora_te1_", 768)
    """How kohya calls the first text encoder, and its width."""
    told: tuple[str, ...] = ()
    """The names by which a file may be refused, besides its own: nothing in some files tells them apart."""
    kohya_original: bool = True


def _unet(**changed: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(**{**UNET, **changed})


_SD = {
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "block_out_channels": (320, 640, 1280, 1280),
    "transformer_layers_per_block": 1,
    "addition_embed_type": None,
    "attention_head_dim": 8,
}
_REFINER = {
    **{"block_out_channels": (384, 768, 1536, 1536), "transformer_layers_per_block": 4},
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    **{"attention_head_dim": (6, 12, 24, 24), "cross_attention_dim": 1280},
    "projection_class_embeddings_input_dim": 2560,
}
_SD35 = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
_LLAMA = LlamaConfig(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    vocab_size=99,
)
_OLD, _FLUXES = ("SD 1.5", "SD 2"), ("Flux.1", "Chroma")

FAMILIES = (
    Family(
        "SD 1.5",
        lambda: _unet(**_SD, cross_attention_dim=768, use_linear_projection=False),
        _sgm(SD_BLOCKS),
        "unet",
        ("lora_te_", 768),
        told=_OLD,
        kohya_original=False,
    ),
    Family(
        "SD 2",
        lambda: _unet(**_SD, cross_attention_dim=1024),
        _sgm(SD_BLOCKS),
        "unet",
        ("lora_te_", 1024),
        told=_OLD,
        kohya_original=False,
    ),
    Family("SDXL", _unet, _sgm(SDXL_BLOCKS), "unet"),
    Family(
        "SDXL refiner",
        lambda: _unet(**_REFINER),
        _sgm(Blocks(2, frozenset({1, 2}))),
        "unet",
        ("lora_te2_", 1280),
    ),
    Family(
        "SD 3",
        lambda: SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536
        ),
        _renamed(_SD3),
    ),
    Family("SD 3.5", lambda: SD3Transformer2DModel(**_SD35), _renamed(_SD3), told=("SD 3",)),
    Family(
        "Flux.1",
        lambda: FluxTransformer2DModel(guidance_embeds=True),
        _renamed(_flux(".", "lin", ("0", "2"))),
        told=_FLUXES,
    ),
    Family(
        "Flux.2", Flux2Transformer2DModel, _renamed(_flux(".", "lin", ("0", "2"))), encoder=None
    ),
    Family(
        "Chroma",
        ChromaTransformer2DModel,
        _renamed(_flux(".", "lin", ("0", "2"))),
        encoder=None,
        told=_FLUXES,
    ),
    Family("Qwen-Image", QwenImageTransformer2DModel, _renamed(()), encoder=None),
    Family(
        "HunyuanVideo",
        lambda: HunyuanVideoTransformer3DModel(guidance_embeds=True),
        _renamed(_flux("_", "linear", ("fc1", "fc2"))),
    ),
    Family("Z-Image", ZImageTransformer2DModel, _renamed(_LUMINA), encoder=None),
    Family(
        "Lumina 2", Lumina2Transformer2DModel, _renamed(_LUMINA), encoder=None, told=("Z-Image",)
    ),
    Family("Wan", WanTransformer3DModel, wan_path, encoder=None),
    Family("LTX", LTXVideoTransformer3DModel, _renamed(()), encoder=None),
    Family("language model", lambda: LlamaForCausalLM(_LLAMA), _renamed(()), "", None),
)

NAMINGS: Mapping[str, Callable[[Family, str], str | None]] = {
    "kohya": lambda family, path: _joined(
        "lora_unet_", family.original(path) if family.kohya_original else path
    ),
    "diffusers": lambda family, path: f"{family.component}.{path}".lstrip("."),
    "PEFT": lambda _, path: f"base_model.model.{path}",
    "original": lambda family, path: (
        f"diffusion_model.{name}" if (name := family.original(path)) else None
    ),
    "LyCORIS": lambda _, path: _joined("lycoris_", path),
}


def _joined(prefix: str, path: str | None) -> str | None:
    return path and prefix + path.replace(".", "_")


def zeros(*shape: int) -> Tensor:
    """One byte a number: only shapes matter."""
    return torch.zeros(shape, dtype=torch.float8_e4m3fn)


def _lora(o: int, i: int, kernel: Shape, *, peft: bool) -> dict[str, Tensor]:
    up, down = ("lora_B", "lora_A") if peft else ("lora_up", "lora_down")
    alpha = {} if peft else {"alpha": torch.tensor(1.0)}
    ones = (1,) * len(kernel)
    return {f"{down}.weight": zeros(1, i, *kernel), f"{up}.weight": zeros(o, 1, *ones), **alpha}


def _dora(o: int, i: int, kernel: Shape, *, peft: bool) -> dict[str, Tensor]:
    name = "lora_magnitude_vector" if peft else "dora_scale"
    ones = (1,) * len(kernel)
    magnitude = zeros(1, o, *ones) if peft and kernel else zeros(o) if peft else zeros(o, 1, *ones)
    return {**_lora(o, i, kernel, peft=peft), name: magnitude}


def _lokr(o: int, i: int, kernel: Shape, *, peft: bool) -> dict[str, Tensor]:
    a, b = (8 if o % 8 == 0 else 1), (8 if i % 8 == 0 else 1)
    size = i // b * torch.Size(kernel).numel()
    return {"lokr_w1": zeros(a, b), "lokr_w2_a": zeros(o // a, 1), "lokr_w2_b": zeros(1, size)}


def _loha(o: int, i: int, kernel: Shape, *, peft: bool) -> dict[str, Tensor]:
    size = i * torch.Size(kernel).numel()
    pairs = {f"hada_w{n}_a": zeros(o, 1) for n in (1, 2)}
    return {**pairs, **{f"hada_w{n}_b": zeros(1, size) for n in (1, 2)}}


def _oft(o: int, i: int, kernel: Shape, *, peft: bool) -> dict[str, Tensor]:
    if peft:
        # Nothing in a diffusers file tells which way a convolution is turned.
        return {"oft_R.weight": zeros(i // 4, 6)} if i % 4 == 0 and not kernel else {}
    return {"oft_blocks": zeros(o // 4, 4, 4)} if o % 4 == 0 else {}


def _full(o: int, i: int, kernel: Shape, *, peft: bool) -> dict[str, Tensor]:
    return {"diff": zeros(o, i, *kernel)}


FIRST = r"(?:single_transformer_|transformer_|model\.)?(?:blocks|layers)\.0\."
"""How the paths of a transformer's first blocks begin."""

LARGE = 800_000
"""Numbers of a weight that is given whole in the first block alone, so that files stay small."""

ALGORITHMS = {
    "LoRA": _lora,
    "LoKr": _lokr,
    "LoHa": _loha,
    "OFT": _oft,
    "full": _full,
    "DoRA": _dora,
}


def layers_of(network: nn.Module) -> dict[str, Shape]:
    """Path -> the weight's shape, of linear layers and convolutions."""
    kinds = (nn.Linear, nn.Conv2d)
    return {n: tuple(m.weight.shape) for n, m in network.named_modules() if isinstance(m, kinds)}


def tensors_of(
    family: Family, layers: Mapping[str, Shape], naming: str, algorithm: str
) -> dict[str, Tensor]:
    """A file of an algorithm over all layers, in a naming; kohya's with a text encoder."""
    made: dict[str, Tensor] = {}
    peft = naming in ("diffusers", "PEFT")
    for path, (o, i, *kernel) in layers.items():
        if algorithm == "full" and o * i > LARGE and not re.match(FIRST, path):
            continue
        if stem := NAMINGS[naming](family, path):
            parts = ALGORITHMS[algorithm](o, i, tuple(kernel), peft=peft)
            made |= {f"{stem}.{suffix}": tensor for suffix, tensor in parts.items()}
    if naming == "kohya" and family.encoder:
        prefix, width = family.encoder
        for layer, part in product(range(2), ("q", "k", "v", "out")):
            stem = f"{prefix}text_model_encoder_layers_{layer}_self_attn_{part}_proj"
            made |= {
                f"{stem}.{suffix}": tensor
                for suffix, tensor in ALGORITHMS[algorithm](width, width, (), peft=False).items()
            }
    return made


def judge(path: Path, family: Family) -> str | None:
    """What is wrong with what becomes of the file; None if nothing is."""
    try:
        file = load(path, sdxl_key_map(), "")
    except LoraError as error:
        if family.name == "SDXL":
            return f"a false refusal: {error.sentence}"
        names = {family.name, *family.told}
        said = re.search(r"made for (.+?)(?:,? whose| \(|, as|, and none)", error.sentence)
        told = set(re.split(r", | or ", said[1].removeprefix("a "))) if said else set()
        return None if told and told <= names else f"a wrong name: {error.sentence}"
    if family.name != "SDXL":
        return f"a false fit: {file.keys} tensors"
    return f"unused: {file.unused[0]}" if file.unused else None


def judged(
    folder: Path, family: Family, layers: Mapping[str, Shape], naming: str, algorithm: str
) -> str | None:
    """What is wrong with what becomes of one file; None if nothing is."""
    path = folder / "adapter.safetensors"
    save_file(tensors_of(family, layers, naming, algorithm), path)
    return judge(path, family)


def table(cells: Mapping[str, list[str]]) -> str:
    """The page's table: family -> a cell for each naming."""
    head = [f"| made for | {' | '.join(NAMINGS)} |", "| --- " * (len(NAMINGS) + 1) + "|"]
    return "\n".join([*head, *(f"| {name} | {' | '.join(row)} |" for name, row in cells.items())])


def rows(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Family, a cell for each naming, and what went wrong."""
    for family in FAMILIES:
        layers = layers_of(on_meta(family))
        cells, faults = [], []
        for naming in NAMINGS:
            right = 0
            for algorithm in ALGORITHMS:
                fault = judged(folder, family, layers, naming, algorithm)
                right += fault is None
                faults += [f"{family.name}, {naming}, {algorithm}: {fault}"] if fault else []
            cells.append(f"{right} of {len(ALGORITHMS)}")
        yield family.name, cells, faults


def derivatives(folder: Path) -> Iterator[tuple[str, str | None]]:
    """SDXL's own shapes under the names that its derivatives have in metadata, and what is wrong."""
    family = next(family for family in FAMILIES if family.name == "SDXL")
    layers = {n: s for n, s in layers_of(on_meta(family)).items() if "attn" in n}
    path = folder / "adapter.safetensors"
    for base in (
        "sdxl_base_v1-0",
        "sdxl_base_v0-9",
        "pony",
        "illustrious",
        "noobai",
        "animagine-xl",
    ):
        for naming in NAMINGS:
            metadata = {"ss_base_model_version": base}
            save_file(tensors_of(family, layers, naming, "LoRA"), path, metadata)
            yield base, judge(path, family)


def on_meta(family: Family) -> nn.Module:
    """The family's network, without numbers."""
    with torch.device("meta"):
        return family.network()


def main() -> int:
    """Prints each family's row, and writes the table."""
    found: dict[str, list[str]] = {}
    every: list[str] = []
    with TemporaryDirectory() as folder:
        for name, cells, faults in rows(Path(folder)):
            found[name] = cells
            print(f"{name}: {', '.join(cells)}", *faults, sep="\n", flush=True)
            every += faults
        for base, fault in derivatives(Path(folder)):
            every += [f"{base}: {fault}"] if fault else []
    print(f"{len(every)} files judged wrongly", *every, sep="\n")
    fill_in(PAGE, "families", table(found))
    return 1 if every else 0


if __name__ == "__main__":
    sys.exit(main())
