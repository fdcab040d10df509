"""What LoRAs cost per denoising step: `python -m benchmarks.lora_steps` (part of `make bench-lora`).

The UNet of SDXL's full size with random weights, in float32 on a CPU (the worker's own precision there) and
in float16 on CUDA; rank 16, one LoRA and four, ours beside diffusers + peft. Within a round each is measured
right after a step without a LoRA; what counts is the median of those ratios. Merged mode comes last: its
originals take as much memory as the weights. Writes `benchmarks/results/lora_steps.json`, and
docs/benchmarks.md; on CUDA `gpu_lora_steps.json`.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size import make_step, write_lora
from benchmarks.lora_engine import Bench, new_bench
from benchmarks.page import keep
from lora.engine.stack import LoraUse, Mode
from lora.formats.adapter import load

log = logging.getLogger("lora_steps")

COUNTS = (1, 4)


@contextmanager
def ours(bench: Bench, paths: list[Path], mode: Mode) -> Iterator[None]:
    """Our engine's stack, applied."""
    files = [load(path, bench.engine.key_map, path.stem, mapped=True) for path in paths]
    with bench.engine.applied([LoraUse(file, 0.3) for file in files], mode):
        yield


@contextmanager
def theirs(bench: Bench, paths: list[Path]) -> Iterator[None]:
    """The same stack by diffusers + peft."""
    names = [f"a{number}" for number in range(len(paths))]
    for path, name in zip(paths, names, strict=True):
        bench.pipeline.load_lora_weights(str(path), adapter_name=name)
    bench.pipeline.set_adapters(names, [0.3] * len(names))
    try:
        yield
    finally:
        bench.pipeline.unload_lora_weights()


def main() -> None:
    """Measures, and writes the result."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)  # peft's
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, help="the latent's side; 128 is 1024 pixels")
    parser.add_argument("--tiny", action="store_true", help="a miniature, to see that it runs")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    cuda = options.device == "cuda"
    side = options.side or (128 if cuda else 32)
    bench = new_bench(options.device, tiny=options.tiny)
    if not cuda:
        bench.unet.float()
    options.folder.mkdir(parents=True, exist_ok=True)
    kind = "float16" if cuda else "bfloat16"
    paths = [write_lora(bench.unet, options.folder, 16, kind, seed) for seed in range(max(COUNTS))]
    step = make_step(bench.unet, side)

    repeats = 10 if cuda else 1

    def seconds() -> float:
        bench.wait()
        begun = time.perf_counter()
        for _ in range(repeats):
            step()
        bench.wait()
        return (time.perf_counter() - begun) / repeats

    ways: dict[str, Callable[[], Any]] = {}
    for count in COUNTS:
        ways[f"{count} dynamic, ours"] = partial(ours, bench, paths[:count], Mode.DYNAMIC)
        ways[f"{count} dynamic, theirs"] = partial(theirs, bench, paths[:count])
    ratios: dict[str, list[float]] = defaultdict(list)
    plain: list[float] = []
    seconds()  # warm up
    merged: dict[str, Callable[[], Any]] = {
        f"{count} merged, ours": partial(ours, bench, paths[:count], Mode.MERGED)
        for count in COUNTS
    }
    for part in (ways, merged):
        for number in range(options.rounds):
            log.info("round %d of %d: %s", number + 1, options.rounds, ", ".join(part))
            for name, way in part.items():
                without = seconds()
                with way():
                    seconds()  # what the first step after a change costs is not a step's cost
                    ratios[name].append(seconds() / without)
                plain.append(without)
    figures = {
        "dtype": str(bench.unet.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "latent_side": side,
        "rounds": options.rounds,
        "seconds_without": round(statistics.median(plain), 4),
        "seconds_without_spread": [round(min(plain), 4), round(max(plain), 4)],
        "ratios": {name: round(statistics.median(found), 4) for name, found in ratios.items()},
    }
    log.info("written to %s", keep("lora_steps", figures, cuda=cuda, tiny=options.tiny))


if __name__ == "__main__":
    main()
