"""Steps of a compiled UNet while LoRAs change: `python -m benchmarks.compiled` (needs CUDA).

SDXL's UNet at full size with random weights in float16, 1024 pixels, two pictures at once as with guidance.
Its repeated blocks are compiled (diffusers' `compile_repeated_blocks`). Then stacks of one and of four LoRAs
come and go, merged and dynamic, ours beside diffusers + peft. Counts the graphs that torch.compile made at
each change (0 is the aim), and the steps per second after it. Writes
`benchmarks/results/gpu_compiled.json`.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.full_size import make_step, write_lora
from benchmarks.lora_engine import Bench, new_bench
from benchmarks.lora_steps import ours, theirs
from benchmarks.page import keep
from lora.engine.stack import Mode

log = logging.getLogger("compiled")

STEPS = 20


def graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    return int(counters["stats"]["unique_graphs"])


def steps_of(bench: Bench, step: Callable[[], Any]) -> dict[str, float]:
    """What the first step after a change takes and compiles, and how many steps a second come after it."""
    made, begun = graphs(), time.perf_counter()
    step()
    bench.wait()
    first = time.perf_counter() - begun
    step()
    bench.wait()
    begun = time.perf_counter()
    for _ in range(STEPS):
        step()
    bench.wait()
    rate = STEPS / (time.perf_counter() - begun)
    return {
        "new graphs": graphs() - made,
        "first step, seconds": round(first, 3),
        "steps per second": round(rate, 2),
    }


def main() -> None:
    """Measures, and writes the result."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)  # peft's
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--side", type=int, default=128, help="the latent's; 128 is 1024 pixels")
    parser.add_argument("--tiny", action="store_true", help="a miniature, to see that it runs")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    bench = new_bench(options.device, tiny=options.tiny)
    options.folder.mkdir(parents=True, exist_ok=True)
    paths = [write_lora(bench.unet, options.folder, 16, "float16", seed) for seed in range(4)]
    step = make_step(bench.unet, options.side)
    figures: dict[str, Any] = {"eager, no LoRA": steps_of(bench, step)}
    bench.unet.compile_repeated_blocks()
    figures["no LoRA"] = steps_of(bench, step)
    changes: list[tuple[str, Callable[[], Any]]] = []
    for mode in (Mode.MERGED, Mode.DYNAMIC):
        for name, stack in (("one", paths[:1]), ("another", paths[1:2]), ("four", paths)):
            changes.append((f"ours, {mode}: {name}", partial(ours, bench, stack, mode)))
    for name, stack in (("one", paths[:1]), ("another", paths[1:2])):
        changes.append((f"diffusers + peft: {name}", partial(theirs, bench, stack)))
    for name, change in changes:
        log.info("%s", name)
        with change():
            figures[name] = steps_of(bench, step)
        log.info("%s", figures[name])
    figures["no LoRA, last"] = steps_of(bench, step)
    cuda = options.device == "cuda"
    about = {"device": torch.cuda.get_device_name() if cuda else "cpu", "side": options.side}
    log.info("written to %s", keep("compiled", about | figures, cuda=cuda, tiny=options.tiny))


if __name__ == "__main__":
    main()
