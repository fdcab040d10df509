"""One job with a LoRA on a model of SDXL's full size, random weights, bfloat16, on the CPU.

    python -m benchmarks.full_size [--model build/sdxl-random]

Makes the model's folder (5 GB) unless it is there, and a kohya LoRA of rank 16 over all 722 linear
layers of the UNet's attention blocks; runs the job through the handler in a process of its own, with
and without the LoRA; writes times and peak memory to `benchmarks/results/full_size.json`.
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
from diffusers import AutoencoderKL, UNet2DConditionModel
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
JOB: dict[str, Any] = {
    "prompt": "a photo of an astronaut riding a horse on mars",
    "width": 256,
    "height": 256,
    "num_inference_steps": 2,
    "seed": 1,
}

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


def make_model(folder: Path) -> None:
    """SDXL base's own configuration with random weights, in diffusers layout and bfloat16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
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
    finally:
        torch.set_default_dtype(torch.float32)
    new_tokenizer(folder / "tokenizer", "<|endoftext|>")
    new_tokenizer(folder / "tokenizer_2", "!")
    new_scheduler().save_pretrained(folder / "scheduler")
    write_index(folder)  # last: a folder with it is whole


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


def _measure(folder: str, results: Any) -> None:
    """In a process of its own, so that the peak of memory is the job's."""
    cache = Path(folder) / "loras"
    cache.mkdir(exist_ok=True)
    settings = Settings(model=folder, dtype="bfloat16", device="cpu", lora_cache_dir=cache)
    begun = time.perf_counter()
    worker = Worker(settings).setup()
    figures: dict[str, Any] = {"setup_s": round(time.perf_counter() - begun, 2)}
    parts = worker.parts
    file = write_lora(parts.pipeline.components["unet"], cache, RANK)
    figures["lora_mb"] = round(file.stat().st_size / 1e6, 1)
    before = {n: p.clone() for n, p in _sample(parts.pipeline.components["unet"])}
    for name, loras in (("plain", None), ("lora", [file.name]), ("lora_again", [file.name])):
        begun = time.perf_counter()
        answer = worker({"id": name, "input": {**JOB, "loras": loras}})
        if "error" in answer:
            raise RuntimeError(answer["error"])
        total = round(time.perf_counter() - begun, 2)
        layers = [lora["layers"] for lora in answer["loras"]]
        figures[name] = {"total_s": total, "layers": layers, "timings": answer["timings"]}
    after = dict(_sample(parts.pipeline.components["unet"]))
    figures["sampled_weights_unchanged"] = all(torch.equal(before[n], after[n]) for n in before)
    figures["peak_memory_gb"] = round(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2
    )
    results.put(figures)


def _sample(unet: nn.Module) -> Sequence[tuple[str, torch.Tensor]]:
    """Every twentieth weight: a copy of them all would count as the job's memory."""
    return list(unet.named_parameters())[::20]


def make_step(unet: Any, side: int) -> Callable[[], Any]:
    """One forward of a UNet on a latent of side x side; on CUDA with guidance, two pictures at once."""
    config = unet.config
    place: dict[str, Any] = {"device": unet.device, "dtype": unet.dtype}
    batch = 2 if unet.device.type == "cuda" else 1
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
    folder: Path = parser.parse_args().model
    if not (folder / "model_index.json").exists():
        log.info("making %s", folder)
        make_model(folder)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_measure, args=(str(folder), results))
    process.start()
    figures = results.get(timeout=3000)
    process.join()
    log.info("%s", json.dumps(figures, indent=1))
    log.info("written to %s", write_result("full_size", {"job": JOB, **figures}))


if __name__ == "__main__":
    main()
