"""One job with a LoRA on a model of SDXL's full size with random weights, from a fresh process on.

    python -m benchmarks.full_size [--model build/sdxl-random] [--device cuda]

Makes the model's folder (7 GB) unless it is there, and a kohya LoRA of rank 16 over all 722 linear layers
of the UNet's attention blocks. A process of its own imports the handler, loads the model (its files are in
the page cache) and runs jobs with and without the LoRA; another does what a plain script with diffusers
does. On the CPU: bfloat16, 256 pixels, 2 steps; on CUDA: float16, 1024 pixels, 30 steps. Writes times and
peak memory to `benchmarks/results/full_size.json`, on CUDA to `gpu_full_size.json`.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.report import write_result
from demo.networks import TOPOLOGY, new_scheduler, new_tokenizer, write_index
from handler import Worker
from lora.formats.names.sgm import sgm_path
from settings import Settings

log = logging.getLogger("full_size")

RANK = 16
PROMPT = "a photo of an astronaut riding a horse on mars"
DTYPES = {"cpu": "bfloat16", "cuda": "float16"}
SIZES = {"cpu": (256, 2), "cuda": (1024, 30)}
"""Pixels a side, and denoising steps."""

CONFIG: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""What makes SDXL's topology full size."""


def make_model(folder: Path, device: str) -> None:
    """SDXL base's own configuration with random weights, in diffusers layout and 16-bit numbers."""
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, DTYPES[device]))
    try:
        with torch.device(device):
            _save_networks(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    new_tokenizer(folder / "tokenizer", "<|endoftext|>")
    new_tokenizer(folder / "tokenizer_2", "!")
    new_scheduler().save_pretrained(folder / "scheduler")
    write_index(folder)  # last: a folder with it is whole


def _save_networks(folder: Path) -> None:
    unet = UNet2DConditionModel(**TOPOLOGY, **CONFIG)
    unet.save_pretrained(folder / "unet")
    del unet
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=1024,
        scaling_factor=0.13025,
        force_upcast=False,
    ).save_pretrained(folder / "vae")
    CLIPTextModel(_text(768, 12, 12, 3072, 768, "quick_gelu")).save_pretrained(
        folder / "text_encoder"
    )
    CLIPTextModelWithProjection(_text(1280, 32, 20, 5120, 1280, "gelu")).save_pretrained(
        folder / "text_encoder_2"
    )


def _text(
    width: int, layers: int, heads: int, inner: int, projection: int, act: str
) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        projection_dim=projection,
        hidden_act=act,
        bos_token_id=49406,
        eos_token_id=49407,
    )


def linear_layers(unet: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Every linear layer of the attention blocks: 722 of them at full size."""
    return [
        (path, module)
        for path, module in unet.named_modules()
        if isinstance(module, nn.Linear) and ".attentions." in path
    ]


def write_lora(
    unet: nn.Module, folder: Path, rank: int, dtype: str = "float16", seed: int = 7
) -> Path:
    """A kohya LoRA with SGM names over all of them, alpha = rank / 2; made if it is not there yet."""
    path = folder / f"full-size-rank{rank}-{dtype}-{seed}.safetensors"
    if path.exists():
        return path
    generator = torch.Generator().manual_seed(seed)
    paths = [name for name, _ in unet.named_modules()]
    tensors: dict[str, torch.Tensor] = {}
    for name, module in linear_layers(unet):
        stem = "lora_unet_" + str(sgm_path(name, paths)).replace(".", "_")
        down = torch.randn(rank, module.in_features, generator=generator) / rank
        up = torch.randn(module.out_features, rank, generator=generator) / 100
        tensors[f"{stem}.lora_down.weight"] = down
        tensors[f"{stem}.lora_up.weight"] = up
        tensors[f"{stem}.alpha"] = torch.tensor(rank / 2)
    metadata = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_dim": str(rank)}
    save_file({k: t.to(getattr(torch, dtype)) for k, t in tensors.items()}, path, metadata)
    return path


def _measure(folder: str, device: str, begun: float, results: Any) -> None:
    """In a process of its own, so that the peak of memory is the job's. `begun`: when it was started."""
    figures: dict[str, Any] = {"python and imports": round(time.time() - begun, 2)}
    cache = Path(folder) / "loras"
    cache.mkdir(exist_ok=True)
    settings = Settings(model=folder, dtype=DTYPES[device], device=device, lora_cache_dir=cache)
    worker = Worker(settings).setup()
    figures["ready"] = round(time.time() - begun, 2)
    side, steps = SIZES[device]
    job = {"prompt": PROMPT, "width": side, "height": side, "num_inference_steps": steps, "seed": 1}
    unet = worker.parts.pipeline.components["unet"]
    file = write_lora(unet, cache, RANK)
    figures["lora_mb"] = round(file.stat().st_size / 1e6, 1)
    before = {n: p.clone() for n, p in _sample(unet)}
    pictures = {}
    jobs: dict[str, dict[str, Any]] = {
        "plain": {},
        "plain, again": {},
        "dynamic": {"loras": [file.name], "lora_mode": "dynamic"},
        "dynamic, again": {"loras": [file.name], "lora_mode": "dynamic"},
        "merged": {"loras": [file.name], "lora_mode": "merged"},
        "merged, again": {"loras": [file.name], "lora_mode": "merged"},
        "plain, last": {},
    }
    for name, fields in jobs.items():
        _reset_peak(device)
        now = time.perf_counter()
        answer = worker({"id": name, "input": {**job, **fields}})
        if "error" in answer:
            raise RuntimeError(answer["error"])
        total = round(time.perf_counter() - now, 3)
        figures.setdefault("first picture", round(time.time() - begun, 2))
        pictures[name] = answer["images"]
        layers = [lora["layers"] for lora in answer["loras"]]
        figures[name] = {"total_s": total, "layers": layers, "timings": answer["timings"]}
        if device == "cuda":
            figures[name]["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    after = dict(_sample(unet))
    figures["plain pictures are the same"] = (
        pictures["plain"] == pictures["plain, again"] == pictures["plain, last"]
    )
    figures["pictures with the LoRA differ"] = pictures["plain"] != pictures["merged"]
    figures["sampled_weights_unchanged"] = all(torch.equal(before[n], after[n]) for n in before)
    figures["peak_memory_gb"] = _peak_memory()
    results.put(figures)


def _diffusers(folder: str, device: str, begun: float, results: Any) -> None:
    """A plain script's start: the same folder, and the same picture."""
    side, steps = SIZES[device]
    dtype = getattr(torch, DTYPES[device])
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder, dtype=dtype, add_watermarker=False
    ).to(device)
    figures = {"ready": round(time.time() - begun, 2)}
    pipeline(PROMPT, width=side, height=side, num_inference_steps=steps)
    figures["first picture"] = round(time.time() - begun, 2)
    now = time.perf_counter()
    pipeline(PROMPT, width=side, height=side, num_inference_steps=steps)
    figures["second picture takes"] = round(time.perf_counter() - now, 3)
    results.put({**figures, "peak_memory_gb": _peak_memory()})


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak_memory() -> float:
    """GB of the machine's memory that this process ever held."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


def _sample(unet: nn.Module) -> Sequence[tuple[str, torch.Tensor]]:
    """Every twentieth weight: a copy of them all would count as the job's memory."""
    return list(unet.named_parameters())[::20]


def make_step(unet: Any, side: int, batch: int | None = None) -> Callable[[], Any]:
    """One forward of a UNet on latents of side x side; on CUDA two at once if not told, as with guidance."""
    config = unet.config
    place: dict[str, Any] = {"device": unet.device, "dtype": unet.dtype}
    batch = batch or (2 if unet.device.type == "cuda" else 1)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    inputs = {
        "sample": torch.randn(batch, 4, side, side, **place),
        "timestep": torch.tensor(500, device=unet.device),
        "encoder_hidden_states": torch.randn(batch, 77, config.cross_attention_dim, **place),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, pooled, **place),
            "time_ids": torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * batch, **place),
        },
    }

    @torch.no_grad()
    def step() -> Any:
        return unet(**inputs)

    return step


def main() -> None:
    """Makes what is missing, measures, writes the result."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("build/sdxl-random"))
    parser.add_argument("--device", default="cpu", choices=DTYPES)
    options = parser.parse_args()
    folder: Path = options.model
    if not (folder / "model_index.json").exists():
        log.info("making %s", folder)
        make_model(folder, options.device)
    for file in folder.glob("*/*.safetensors"):
        file.read_bytes()  # into the page cache
    context = multiprocessing.get_context("spawn")
    found = {}
    for name, measure in (("worker", _measure), ("plain diffusers", _diffusers)):
        results = context.Queue()
        given = (str(folder), options.device, time.time(), results)
        process = context.Process(target=measure, args=given)
        process.start()
        found[name] = results.get(timeout=3000)
        process.join()
    side, steps = SIZES[options.device]
    figures = {"pixels": side, "steps": steps, "dtype": DTYPES[options.device], **found}
    cuda = options.device == "cuda"
    if cuda:
        figures["device"] = torch.cuda.get_device_name()
    log.info("%s", json.dumps(figures, indent=1))
    log.info("written to %s", write_result("gpu_full_size" if cuda else "full_size", figures))


if __name__ == "__main__":
    main()
