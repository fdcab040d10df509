"""Trains the demo model from nothing: `python -m demo.train STAGE`, in the order of the stages.

    vae        the autoencoder; `--again` runs another cycle from the saved weights
    base       both text encoders and the UNet, on the autoencoder's latents; `--again` as above
    adapters   the four LoRAs, on the frozen base
    decoder    the autoencoder's decoder once more, alone
    tiny       the tiny autoencoder that live frames use, on the autoencoder's latents

Each stage writes what it made into `demo/model/` or `demo/loras/` when it is done, logs a line with the
time left every 50 steps, and keeps a checkpoint under `build/train/` from which it goes on when it is
started again. The weights in the repo were made in this order: `vae --steps 900` (still without the
weight on edges), `vae --again --steps 650`, `base --steps 2800`, `decoder --steps 700`, `base --again
--steps 650`, `adapters --steps 200` and, for the spiral,
`adapters --only spiral --steps 480`; two CPU cores, about 90 minutes. `tiny --steps 1200`
ended with a loss of 0.29 after 14 minutes on one core.
"""

from __future__ import annotations

import argparse
import logging
import random

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from demo import pictures
from demo.adapters import ADAPTERS, load_base, train_adapter
from demo.networks import (
    new_scheduler,
    new_tiny_vae,
    new_tokenizer,
    new_unet,
    new_vae,
    text_config,
    write_index,
)
from demo.training import (
    DEVICE,
    MODEL,
    Base,
    Run,
    log,
    make_bank,
    picture_bank,
    random_phrase,
    save,
)


def edge_weight(batch: Tensor) -> Tensor:
    """How much each pixel's error counts, [n, 1, SIDE, SIDE]: 1 on flat ground, up to 5 near an edge."""
    change = (batch - functional.avg_pool2d(batch, 3, 1, 1, count_include_pad=False)).abs()
    near = functional.max_pool2d(change.mean(dim=1, keepdim=True), 5, 1, 2)
    return 1 + 4 * (3 * near).clamp(max=1)


def train_vae(steps: int, *, again: bool) -> None:
    """L1 + MSE, more near edges, + a little KL on pictures of every style.

    `again`: another cycle from the saved weights. Saved with the latents' own scaling factor.
    """
    torch.manual_seed(1 + again)
    vae = (
        AutoencoderKL.from_pretrained(MODEL / "vae").float().to(DEVICE)
        if again
        else new_vae().to(DEVICE)
    )
    bank = picture_bank(12_000, seed=1)
    log.info("vae: %.2f M parameters", sum(p.numel() for p in vae.parameters()) / 1e6)
    name = "vae-again" if again else "vae"
    run = Run(name, steps, list(vae.parameters()), 1e-3, average=0.99)

    def loss_of() -> Tensor:
        rows = torch.randint(len(bank), (16,))
        batch = bank[rows].to(DEVICE, torch.float32) / 127.5 - 1
        posterior = vae.encode(batch).latent_dist
        drawn = vae.decode(posterior.sample()).sample
        error = (drawn - batch).abs() + (drawn - batch).square()
        return (error * edge_weight(batch)).mean() + 1e-6 * posterior.kl().mean()

    run.train(loss_of)
    with torch.no_grad():
        latents = vae.encode(bank[:512].to(DEVICE, torch.float32) / 127.5 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    save(vae, "vae")
    log.info("vae: saved, scaling factor %.3f", vae.config.scaling_factor)


def polish_decoder(steps: int) -> None:
    """The decoder alone, for sharper pictures; the latents, and so all that was trained on them, stay.

    It reads latents with a little noise, as those that the UNet draws have.
    """
    torch.manual_seed(3)
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").float().to(DEVICE)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    bank = picture_bank(12_000, seed=2)
    trained = [p for p in vae.parameters() if p.requires_grad]
    noise = 0.05 / vae.config.scaling_factor

    def loss_of() -> Tensor:
        batch = bank[torch.randint(len(bank), (16,))].to(DEVICE, torch.float32) / 127.5 - 1
        with torch.no_grad():
            latents = vae.encode(batch).latent_dist.mean
        drawn = vae.decode(latents + noise * torch.randn_like(latents)).sample
        error = (drawn - batch).abs() + (drawn - batch).square()
        return (error * edge_weight(batch)).mean()

    Run("decoder", steps, trained, 1e-3, average=0.99).train(loss_of)
    save(vae, "vae")


def train_tiny(steps: int) -> None:
    """Its encoder learns the autoencoder's latents, its decoder the picture that they are of.

    The decoder reads the autoencoder's latents with a little noise, as those that the UNet draws have.
    """
    torch.manual_seed(4)
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").float().to(DEVICE)
    tiny = new_tiny_vae().to(DEVICE)
    log.info("tiny: %.2f M parameters", sum(p.numel() for p in tiny.parameters()) / 1e6)
    bank = picture_bank(3_000, seed=4)
    with torch.no_grad():
        wanted = torch.cat([_latents(vae, part) for part in torch.split(bank, 100)])

    def loss_of() -> Tensor:
        rows = torch.randint(len(bank), (8,))
        batch, latents = _pixels(bank[rows]), wanted[rows]
        drawn = tiny.decode(latents + 0.05 * torch.randn_like(latents)).sample
        error = (drawn - batch).abs() + (drawn - batch).square()
        missed = (tiny.encode(batch).latents - latents).square()
        return (error * edge_weight(batch)).mean() + missed.mean()

    Run("tiny", steps, list(tiny.parameters()), 3e-3, average=0.99).train(loss_of)
    save(tiny, "../tiny_vae", drop="block_out_channels")


def _pixels(bank: Tensor) -> Tensor:
    return bank.to(DEVICE, torch.float32) / 127.5 - 1


def _latents(vae: AutoencoderKL, bank: Tensor) -> Tensor:
    return vae.encode(_pixels(bank)).latent_dist.mean * vae.config.scaling_factor


def all_phrases() -> list[str]:
    """Every sentence that training may say, for the tokenizer's vocabulary."""
    scenes = [
        pictures.Scene(*combination, size=size)
        for combination in pictures.all_combinations()
        for size in pictures.RADII
    ]
    return [scene.prompt(phrase) for scene in scenes for phrase in pictures.PHRASES]


def new_base() -> Base:
    """Both text encoders and the UNet with fresh weights, and the tokenizers, which are saved at once."""
    # SDXL pads its first encoder with the end token and its second with "!".
    first = new_tokenizer(MODEL / "tokenizer", "<|endoftext|>", all_phrases())
    second = new_tokenizer(MODEL / "tokenizer_2", "!", all_phrases())
    encoders = (
        CLIPTextModel(text_config(first, 32, 2, "quick_gelu")).to(DEVICE),
        CLIPTextModelWithProjection(text_config(second, 64, 4, "gelu")).to(DEVICE),
    )
    return Base(new_unet().to(DEVICE), encoders, (first, second))


def train_base(steps: int, *, again: bool) -> None:
    """Both text encoders and the UNet together, on plain pictures.

    `again`: another cycle from the saved weights.
    """
    torch.manual_seed(2 + 10 * again)
    random.seed(2 + 10 * again)
    base = load_base() if again else new_base()
    parts = (base.unet, *base.encoders)
    for part in parts:
        part.train().requires_grad_(True)
        size = sum(p.numel() for p in part.parameters()) / 1e6
        log.info("base: %s %.2f M", type(part).__name__, size)
    bank = make_bank(24_000, seed=3 + 10 * again)
    batches = bank.batches(64, random_phrase)

    def loss_of() -> Tensor:
        latents, prompts = next(batches)
        return base.loss(latents, base.tokens(prompts))

    trained = [p for part in parts for p in part.parameters()]
    Run("base-again" if again else "base", steps, trained, 1.5e-3).train(loss_of)
    save(base.unet, "unet")
    save(base.encoders[0], "text_encoder")
    save(base.encoders[1], "text_encoder_2")
    new_scheduler().save_pretrained(MODEL / "scheduler")
    write_index(MODEL)


def main() -> None:
    """Reads the command line and runs one stage."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["vae", "base", "adapters", "decoder", "tiny"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--only", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS))
    parser.add_argument("--again", action="store_true", help="vae, base: another cycle")
    options = parser.parse_args()
    if options.stage == "vae":
        train_vae(options.steps or 900, again=options.again)
    elif options.stage == "base":
        train_base(options.steps or 2800, again=options.again)
    elif options.stage == "decoder":
        polish_decoder(options.steps or 700)
    elif options.stage == "tiny":
        train_tiny(options.steps or 1500)
    else:
        for name in options.only:
            train_adapter(ADAPTERS[name], options.steps or 200)


if __name__ == "__main__":
    main()
