"""The LoRA engine beside diffusers + peft: `make bench-lora` (or `python -m benchmarks.lora_engine`).

A UNet of SDXL's full size with random weights, and LoRAs of rank 16, 64 and 128 over the 722 linear layers
of its attention blocks. Both engines take turns in one process on the same model and files, for several
rounds; what counts is the median, and above all the ratio. Writes `benchmarks/results/lora_engine.json`,
docs/benchmarks.md's table and its plot; on CUDA `gpu_lora_engine.json`.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn

from benchmarks.full_size import CONFIG, linear_layers, write_lora
from benchmarks.page import keep
from demo.networks import TOPOLOGY, new_unet
from lora.engine.engine import GB, Budgets, LoraEngine
from lora.engine.stack import LoraUse, Mode
from lora.formats.adapter import load
from pipelines.loading import load_models
from settings import Settings

log = logging.getLogger("lora_engine")

RANKS = (16, 64, 128)
CAST_RANKS = (16, 64)
"""The ranks that are also measured with files of another dtype."""


@dataclass
class Bench:
    """The model, its files, and the seconds that were measured so far, by figure and engine."""

    unet: Any
    pipeline: Any
    engine: LoraEngine
    device: torch.device
    seconds: dict[str, dict[str, list[float]]]

    @contextmanager
    def timed(self, figure: str, who: str) -> Iterator[None]:
        """Adds the time of the block to a figure; on a GPU the work itself, not its start."""
        self.wait()
        begun = time.perf_counter()
        yield
        self.wait()
        self.seconds[figure][who].append(time.perf_counter() - begun)

    def wait(self) -> None:
        """Until the device has done all that it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


Measure = Callable[[Bench, Path, str], None]


def new_bench(device: str, *, tiny: bool) -> Bench:
    """A fresh model in bfloat16 (float16 on CUDA) on the device, and both engines on it."""
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    unet = new_unet().to(dtype) if tiny else _full_size_unet(dtype)
    unet.to(device).eval().requires_grad_(False)
    # The rest of the pipeline is the demo's: diffusers wants one to load a LoRA.
    models = load_models(Settings(model="demo", device="cpu"))
    parts = {**models.base.components, "unet": unet}
    return Bench(
        unet,
        StableDiffusionXLPipeline(**parts, add_watermarker=False),
        LoraEngine({"unet": unet}),
        torch.device(device),
        defaultdict(lambda: defaultdict(list)),
    )


def _full_size_unet(dtype: torch.dtype) -> nn.Module:
    """Filled from one block of random numbers: drawing 2.6 billion would take longer than the benchmark."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**TOPOLOGY, **CONFIG)
    unet = unet.to(dtype).to_empty(device="cpu")
    block = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    for parameter in unet.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, flat.numel(), len(block)):
            piece = flat[start : start + len(block)]
            piece.copy_(block[: len(piece)])
    return unet


def measure_file(bench: Bench, path: Path, name: str, turn: Sequence[Measure]) -> None:
    """One round of one file, by the engines in turn: load, apply, remove, come back, merge, restore."""
    path.read_bytes()  # into the page cache
    for measure in turn:
        gc.collect()
        measure(bench, path, name)


def _measure_ours(bench: Bench, path: Path, name: str) -> None:
    engine = bench.engine
    engine.free()

    def enter(figure: str, mode: Mode, scale: float = 1.0) -> Any:
        block = engine.applied([LoraUse(file, scale)], mode)
        with bench.timed(figure, "ours"):
            block.__enter__()
        return block

    def leave(figure: str, block: Any) -> None:
        with bench.timed(figure, "ours"):
            block.__exit__(None, None, None)

    with bench.timed(f"{name}: loaded, dynamic", "ours"):
        file = load(path, engine.key_map, path.stem, mapped=True)
        block = engine.applied([LoraUse(file)], Mode.DYNAMIC)
        block.__enter__()
    leave(f"{name}: removed", block)
    leave("", enter(f"{name}: back to a stack used before", Mode.DYNAMIC))
    leave("", enter(f"{name}: another scale", Mode.DYNAMIC, 0.5))
    # The first merge after the start (or after the budget took them) copies the originals, too.
    leave("", enter(f"{name}: merged for the first time, its originals copied", Mode.MERGED, 0.7))
    with bench.timed(f"{name}: loaded, merged", "ours"):
        file = load(path, engine.key_map, path.stem, mapped=True)
        block = engine.applied([LoraUse(file, 0.9)], Mode.MERGED)
        block.__enter__()
    leave(f"{name}: restored", block)
    with bench.timed(f"{name}: loaded, dynamic, read instead of mapped", "ours"):
        file = load(path, engine.key_map, path.stem, mapped=False)
    engine.free()


def _measure_theirs(bench: Bench, path: Path, name: str) -> None:
    pipeline = bench.pipeline
    with bench.timed(f"{name}: loaded, dynamic", "theirs"):
        pipeline.load_lora_weights(str(path), adapter_name="one")
    with bench.timed(f"{name}: another scale", "theirs"):
        pipeline.set_adapters(["one"], [0.5])
    with bench.timed(f"{name}: removed", "theirs"):
        pipeline.unload_lora_weights()
    with bench.timed(f"{name}: back to a stack used before", "theirs"):
        pipeline.load_lora_weights(str(path), adapter_name="one")
    pipeline.unload_lora_weights()
    with bench.timed(f"{name}: loaded, merged", "theirs"):
        pipeline.load_lora_weights(str(path), adapter_name="one")
        pipeline.fuse_lora(components=["unet"])
    with bench.timed(f"{name}: restored", "theirs"):
        pipeline.unfuse_lora(components=["unet"])
    pipeline.unload_lora_weights()


def measure_merged_again(bench: Bench, path: Path, name: str, rounds: int) -> None:
    """Coming back to a merged stack, with a budget that holds one: 4.4 GB, more than the default."""
    engine = LoraEngine({"unet": bench.unet}, Budgets(prepared=6 * GB))
    stack = [LoraUse(load(path, engine.key_map, path.stem, mapped=True))]
    with engine.applied(stack, Mode.MERGED):
        pass
    for _ in range(rounds):
        block = engine.applied(stack, Mode.MERGED)
        with bench.timed(f"{name}: merged, back to a stack used before", "ours"):
            block.__enter__()
        block.__exit__(None, None, None)


def measure_exactness(bench: Bench, path: Path) -> dict[str, int]:
    """How many of the adapted weights' numbers differ after merging and restoring, by engine."""
    weights = {p: module.weight for p, module in linear_layers(bench.unet)}
    before = {p: weight.clone() for p, weight in weights.items()}

    def changed() -> int:
        return sum(int((weights[p] != before[p]).sum()) for p in before)

    file = load(path, bench.engine.key_map, path.stem, mapped=True)
    with bench.engine.applied([LoraUse(file)], Mode.MERGED):
        pass
    ours = changed()
    bench.pipeline.load_lora_weights(str(path), adapter_name="one")
    bench.pipeline.fuse_lora(components=["unet"])
    bench.pipeline.unfuse_lora(components=["unet"])
    bench.pipeline.unload_lora_weights()
    theirs = changed()
    for p, weight in weights.items():
        weight.copy_(before[p])
    return {"of": sum(w.numel() for w in weights.values()), "ours": ours, "theirs": theirs}


def copy_rate(bench: Bench) -> float:
    """GB/s of the device's memory in a copy of 4 GB, counting what is read and what is written."""
    source = torch.empty(2_000_000_000, dtype=torch.float16, device=bench.device).normal_()
    target = torch.empty_like(source)
    target.copy_(source)
    for _ in range(5):
        with bench.timed("copy", "ours"):
            target.copy_(source)
    return round(8 / statistics.median(bench.seconds.pop("copy")["ours"]), 1)


def medians(bench: Bench) -> dict[str, dict[str, float]]:
    """Figure -> engine -> median seconds, and the ratio where both were measured."""
    found: dict[str, dict[str, float]] = {}
    for figure, by_engine in bench.seconds.items():
        if figure:
            one = {who: round(statistics.median(times), 5) for who, times in by_engine.items()}
            if len(one) == 2:
                one["ratio"] = round(one["theirs"] / one["ours"], 2)
            found[figure] = one
    return found


def main() -> None:
    """Makes what is missing, measures, writes the results."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", category=UserWarning
    )  # peft's, of adapters that it meets again
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a miniature, to see that it runs")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    cuda = options.device == "cuda"
    bench = new_bench(options.device, tiny=options.tiny)
    options.folder.mkdir(parents=True, exist_ok=True)
    own, other = ("float16", "bfloat16") if cuda else ("bfloat16", "float16")
    files = {
        (rank, dtype): write_lora(bench.unet, options.folder, rank, dtype)
        for rank in RANKS
        for dtype in ((own, other) if rank in CAST_RANKS else (own,))
    }
    for number in range(options.rounds):
        for (rank, dtype), path in files.items():
            log.info("round %d of %d: rank %d, %s", number + 1, options.rounds, rank, dtype)
            same = "the model's dtype" if dtype == own else "cast"
            turn = (_measure_ours, _measure_theirs)
            measure_file(bench, path, f"rank {rank}, {same}", turn if number % 2 else turn[::-1])
    bench.engine.free()
    measure_merged_again(bench, files[16, own], "rank 16, the model's dtype", options.rounds)
    exactness = measure_exactness(bench, files[16, own])
    figures: dict[str, Any] = {
        "model": "miniature" if options.tiny else "SDXL's UNet, 2.57 billion random parameters",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "dtype": own,
        "rounds": options.rounds,
        "numbers_changed_after_merge_and_restore": exactness,
        "median_seconds": medians(bench),
    }
    if cuda:
        figures["copy_gb_per_second"] = copy_rate(bench)
    log.info("written to %s", keep("lora_engine", figures, cuda=cuda, tiny=options.tiny))


if __name__ == "__main__":
    main()
