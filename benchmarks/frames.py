"""Frames per second of one-step image to image, and what changing LoRAs costs.

    python -m benchmarks.frames

SDXL's UNet at full size with random weights, one step without guidance on 512 pixels, between the encoder
and the decoder of a tiny VAE (diffusers' AutoencoderTiny, random weights); float16 on CUDA. Measured without
a LoRA, with one, with four, and while every frame has another stack. Writes
`benchmarks/results/frames.json`, on CUDA `gpu_frames.json`. This is the engine alone: no session, no wire.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny

from benchmarks.full_size import make_step, write_lora
from benchmarks.lora_engine import Bench, new_bench
from benchmarks.page import keep
from lora.engine.engine import GB, Budgets, LoraEngine
from lora.engine.stack import LoraUse, Mode
from lora.formats.adapter import LoraFile, load

log = logging.getLogger("frames")


def make_frame(bench: Bench, pixels: int) -> Callable[[], Any]:
    """One frame: encode, one step, decode."""
    vae = AutoencoderTiny().to(bench.device, bench.unet.dtype).eval()
    step = make_step(bench.unet, pixels // 8, batch=1)
    picture = torch.rand(1, 3, pixels, pixels, device=bench.device, dtype=bench.unet.dtype)

    @torch.no_grad()
    def frame() -> Any:
        latents = vae.encode(picture).latents
        return vae.decode(latents + step().sample).sample

    return frame


def seconds_of(bench: Bench, frame: Callable[[], Any], count: int) -> float:
    """The median of some frames, each waited for."""
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        frame()
        bench.wait()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


@contextmanager
def timed(bench: Bench, into: list[float]) -> Iterator[None]:
    """Adds the block's milliseconds, with the device's work."""
    bench.wait()
    begun = time.perf_counter()
    yield
    bench.wait()
    into.append(1e3 * (time.perf_counter() - begun))


def switches(
    bench: Bench,
    frame: Callable[[], Any],
    stacks: Sequence[list[LoraUse[LoraFile]]],
    mode: Mode,
    count: int,
) -> dict[str, float]:
    """Milliseconds to enter and to leave a stack when every frame has another, and such a frame's in all."""
    enter: list[float] = []
    leave: list[float] = []
    whole: list[float] = []
    for number in range(count + len(stacks)):
        if number == len(stacks):  # each was prepared once
            for times in (enter, leave, whole):
                times.clear()
        with timed(bench, whole):
            block = bench.engine.applied(stacks[number % len(stacks)], mode)
            with timed(bench, enter):
                block.__enter__()
            frame()
            with timed(bench, leave):
                block.__exit__(None, None, None)
    return {
        "enter_ms": round(statistics.median(enter), 3),
        "leave_ms": round(statistics.median(leave), 3),
        "frame_ms": round(statistics.median(whole), 2),
    }


def main() -> None:
    """Measures, and writes the result."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--tiny", action="store_true", help="a miniature, to see that it runs")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    cuda = options.device == "cuda"
    bench = new_bench(options.device, tiny=options.tiny)
    bench.engine = LoraEngine({"unet": bench.unet}, Budgets(prepared=20 * GB if cuda else GB))
    options.folder.mkdir(parents=True, exist_ok=True)
    kind = "float16" if cuda else "bfloat16"
    paths = [write_lora(bench.unet, options.folder, 16, kind, seed) for seed in range(4)]
    files = [load(path, bench.engine.key_map, path.stem, mapped=True) for path in paths]
    ones = [[LoraUse(file, 0.7)] for file in files[:2]]
    four = [LoraUse(file, 0.3) for file in files]
    frame = make_frame(bench, options.pixels)
    seconds_of(bench, frame, 5)  # warm up
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "pixels": options.pixels,
        "frames per second": {"no LoRA": 1 / seconds_of(bench, frame, options.frames)},
    }
    rates: dict[str, float] = figures["frames per second"]
    for mode in (Mode.DYNAMIC, Mode.MERGED):
        for name, stack in (("one LoRA", ones[0]), ("four LoRAs", four)):
            with bench.engine.applied(stack, mode):
                seconds_of(bench, frame, 3)
                rates[f"{name}, {mode}"] = 1 / seconds_of(bench, frame, options.frames)
        figures[f"another LoRA each frame, {mode}"] = switches(
            bench, frame, ones, mode, options.frames
        )
    scaled = [[LoraUse(files[0], scale)] for scale in (0.2, 0.4, 0.6, 0.8)]
    figures["another scale each frame, dynamic"] = switches(
        bench, frame, scaled, Mode.DYNAMIC, options.frames
    )
    figures["frames per second"] = {name: round(rate, 2) for name, rate in rates.items()}
    log.info("%s", figures)
    log.info("written to %s", keep("frames", figures, cuda=cuda, tiny=options.tiny))


if __name__ == "__main__":
    main()
