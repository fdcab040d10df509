"""What every stage of the training shares: the loop with its checkpoints, the banks of pictures, the loss."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, ModelMixin, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
)

from demo import pictures
from demo.networks import SCHEDULE

log = logging.getLogger("demo.train")

HERE = Path(__file__).parent
MODEL = HERE / "model"
LORAS = HERE / "loras"
SCRATCH = HERE.parent / "build" / "train"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Run:
    """One training loop with everything that a checkpoint must hold to go on from."""

    name: str
    steps: int
    parameters: list[nn.Parameter]
    rate: float
    average: float = 0.999
    """Decay of the running average of the weights, which is what is kept in the end."""
    step: int = 0
    optimiser: torch.optim.Optimizer = field(init=False)
    schedule: torch.optim.lr_scheduler.LRScheduler = field(init=False)
    averages: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=self.rate, betas=(0.9, 0.95), weight_decay=1e-3
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, max_lr=self.rate, total_steps=self.steps, pct_start=0.05
        )
        self.averages = [p.detach().clone() for p in self.parameters]
        if self.path.exists():
            self._load()

    @property
    def path(self) -> Path:
        """Where the checkpoint lies."""
        return SCRATCH / f"{self.name}.checkpoint.pt"

    def _load(self) -> None:
        saved = torch.load(self.path, map_location=DEVICE, weights_only=True)
        self.step = saved["step"]
        self.optimiser.load_state_dict(saved["optimiser"])
        self.schedule.load_state_dict(saved["schedule"])
        self.averages = saved["averages"]
        for parameter, value in zip(self.parameters, saved["parameters"], strict=True):
            parameter.data.copy_(value)
        log.info("%s: going on from step %d", self.name, self.step)

    def save(self) -> None:
        """Writes the checkpoint whole or not at all."""
        SCRATCH.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        state = {
            "step": self.step,
            "parameters": [p.data for p in self.parameters],
            "averages": self.averages,
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        torch.save(state, part)
        part.replace(self.path)

    def train(self, loss_of: Callable[[], Tensor]) -> None:
        """Runs the remaining steps, then leaves the averaged weights in the parameters."""
        begun, first, saved = time.monotonic(), self.step, time.monotonic()
        recent: list[float] = []
        while self.step < self.steps:
            loss = loss_of()
            self.optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimiser.step()
            self.schedule.step()
            self.step += 1
            decay = min(self.average, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.averages, [p.data for p in self.parameters], 1 - decay)
            recent.append(loss.item())
            if self.step % 50 == 0:
                pace = (time.monotonic() - begun) / (self.step - first)
                left = pace * (self.steps - self.step) / 60
                log.info(
                    "%s: step %d of %d, loss %.4f, %.2f s a step, %.1f min left",
                    *(self.name, self.step, self.steps, np.mean(recent), pace, left),
                )
                recent.clear()
            if time.monotonic() - saved > 120:
                self.save()
                saved = time.monotonic()
        self.save()
        for parameter, value in zip(self.parameters, self.averages, strict=True):
            parameter.data.copy_(value)


def to_tensor(batch: Iterable[pictures.Pixels]) -> Tensor:
    """Pictures [SIDE, SIDE, 3] in 0..255 -> one tensor [n, 3, SIDE, SIDE] in -1..1."""
    stacked = torch.from_numpy(np.stack(list(batch)))
    return stacked.permute(0, 3, 1, 2).to(DEVICE, torch.float32) / 127.5 - 1


def picture_bank(count: int, seed: int) -> Tensor:
    """Pictures in every style and shape, the adapters' too: [count, 3, SIDE, SIDE] in 0..255."""
    rng = random.Random(seed)
    combinations = pictures.all_combinations((*pictures.SHAPES, "spiral"))
    styles = ((), (), ("stripes",), ("outline",), ("night",), ("stripes", "outline"))
    drawn = []
    for _ in range(count):
        scene = pictures.random_scene(rng, rng.choice(combinations))
        drawn.append(pictures.draw(pictures.with_styles(scene, *rng.choice(styles))))
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


@dataclass
class Base:
    """The parts that turn a prompt and noise into latents, and how they are called in training."""

    unet: UNet2DConditionModel
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    noise: DDPMScheduler = field(default_factory=lambda: DDPMScheduler(**SCHEDULE))

    def tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """The prompts for both encoders: two tensors [n, 77]."""
        first, second = (
            tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
            for tokenizer in self.tokenizers
        )
        return first.to(DEVICE), second.to(DEVICE)

    def encode(self, tokens: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What the pipeline feeds the UNet: the sequence [n, 77, 96] and the pooled vector [n, 64]."""
        first = self.encoders[0](tokens[0], output_hidden_states=True)
        second = self.encoders[1](tokens[1], output_hidden_states=True)
        sequence = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return sequence, second.text_embeds

    def loss(self, latents: Tensor, tokens: tuple[Tensor, Tensor]) -> Tensor:
        """Noise prediction's squared error, weighted min-SNR with gamma 5 (arXiv 2303.09556, eq. 6)."""
        sequence, pooled = self.encode(tokens)
        size = float(pictures.SIDE)
        ids = torch.tensor([[size, size, 0, 0, size, size]], device=DEVICE).repeat(len(latents), 1)
        t = torch.randint(1000, (len(latents),), device=DEVICE)
        noise = torch.randn_like(latents)
        noisy = self.noise.add_noise(latents, noise, t)
        conditions = {"text_embeds": pooled, "time_ids": ids}
        guess = self.unet(noisy, t, sequence, added_cond_kwargs=conditions).sample
        kept = self.noise.alphas_cumprod.to(DEVICE)[t]
        ratio = kept / (1 - kept)
        weight = ratio.clamp(max=5) / ratio
        return ((guess - noise).square().mean(dim=(1, 2, 3)) * weight).mean()


@dataclass
class Bank:
    """Pictures with their words, ready to train on: latents [n, 4, 8, 8] and a scene each."""

    latents: Tensor
    scenes: list[pictures.Scene]

    def batches(
        self, size: int, say: Callable[[pictures.Scene], str]
    ) -> Iterator[tuple[Tensor, list[str]]]:
        """Random batches for ever; one prompt in ten is left empty, for classifier-free guidance."""
        rng = random.Random(5)
        while True:
            rows = rng.choices(range(len(self.scenes)), k=size)
            prompts = ["" if rng.random() < 0.1 else say(self.scenes[row]) for row in rows]
            yield self.latents[rows], prompts


@torch.no_grad()
def make_bank(
    count: int, seed: int, *styles: str, shapes: tuple[str, ...] = pictures.SHAPES
) -> Bank:
    """Draws scenes whose combination is not held out and encodes them with the saved autoencoder."""
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").float().to(DEVICE)
    rng = random.Random(seed)
    held_out = set(pictures.held_out_combinations())
    allowed = [c for c in pictures.all_combinations(shapes) if c not in held_out]
    scenes = [pictures.random_scene(rng, allowed[i % len(allowed)]) for i in range(count)]
    latents = []
    for batch in _batched(scenes, 64):
        drawn = to_tensor(pictures.draw(pictures.with_styles(s, *styles)) for s in batch)
        latents.append(vae.encode(drawn).latent_dist.mean * vae.config.scaling_factor)
    return Bank(torch.cat(latents), scenes)


def _batched(items: list[pictures.Scene], size: int) -> Iterator[list[pictures.Scene]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def random_phrase(scene: pictures.Scene) -> str:
    """The scene in words, phrased at random."""
    return scene.prompt(random.choice(pictures.PHRASES))


def save(part: ModelMixin | PreTrainedModel, name: str, drop: str = "_name_or_path") -> None:
    """Writes a part of the model in half precision, without one entry of its config.

    That is the path it may have been loaded from, or what a class writes and does not read.
    """
    part.half().save_pretrained(MODEL / name)
    file = MODEL / name / "config.json"
    config = json.loads(file.read_text())
    config.pop(drop, None)
    file.write_text(json.dumps(config, indent=2) + "\n")
