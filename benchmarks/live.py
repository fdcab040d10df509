"""Live frames on the demo model: `make bench-live` (`python -m benchmarks.live`); `--full` adds SDXL's UNet.

Measured: frames under a random order of presets, strengths and prompts against each alone, bit for bit; the
milliseconds of a switch and of a changed strength, beside diffusers + peft in the same run; memory over many
switches; four presets in one batch; a stream batch against one frame after the other; intervals while a large
LoRA is fetched; the wire without a model; the first frame of a session that follows one that broke. Times of
one thread are its CPU seconds (`thread_time`), so that what else the machine does does not count; those of
sessions are wall seconds. Writes `benchmarks/results/live.json`, with the load of the machine, and the table
of docs/live.md. About ten minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from benchmarks.full_size import write_lora
from benchmarks.live_checks import run_checks
from benchmarks.live_demo import PROMPTS, Demo, median, milliseconds, new_demo
from benchmarks.live_loading import measure_loading
from benchmarks.live_wire import measure_recovery, measure_wire
from benchmarks.lora_engine import new_bench
from benchmarks.report import fill_in, write_result
from live.painter import Drawn
from lora.engine.engine import LoraEngine
from lora.engine.rows import Rows
from lora.engine.stack import LoraUse, Mode, Stack
from lora.formats.adapter import load
from pipelines.live import LiveStream, Spec, spread

log = logging.getLogger("live")


def measure_switches(
    engine: LoraEngine, first: Stack, second: Stack, rounds: int
) -> dict[str, float]:
    """Warm switches between two stacks, and changed strengths, in dynamic mode."""
    warm, strengths, chance = list[float](), list[float](), random.Random(1)
    with engine.applied([], Mode.DYNAMIC) as block:
        for stack in (first, second):
            block.switch(stack)
        for _ in range(rounds):
            warm.append(milliseconds(lambda: block.switch(first)))
            warm.append(milliseconds(lambda: block.switch(second)))
            changed = [replace(use, scale=use.scale * (0.5 + chance.random())) for use in second]
            strengths.append(milliseconds(lambda c=changed: block.switch(c)))  # type: ignore[misc]
    return {"switch ms": median(warm), "strength ms": median(strengths)}


def measure_peft(pipeline: Any, paths: Sequence[Path], rounds: int) -> dict[str, float]:
    """The same by diffusers + peft: both adapters loaded, `set_adapters` between them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index, path in enumerate(paths):
            pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"a{index}")
        switch, strengths, chance = list[float](), list[float](), random.Random(1)
        for number in range(rounds):
            name = f"a{number % 2}"
            switch.append(milliseconds(lambda n=name: pipeline.set_adapters([n], [1.0])))  # type: ignore[misc]
            scale = chance.random()
            strengths.append(
                milliseconds(lambda n=name, s=scale: pipeline.set_adapters([n], [s]))  # type: ignore[misc]
            )
        pipeline.unload_lora_weights()
    return {"switch ms": median(switch), "strength ms": median(strengths)}


def measure_batches(demo: Demo, rounds: int) -> dict[str, Any]:
    """CPU milliseconds of four presets in one batch of four, and of a stream batch at four steps."""
    parts, done = demo.worker.parts, list[Drawn]()
    stream = LiveStream(parts.pipeline, Spec(64, 64, spread(4, 0.5)))
    conditions = stream.conditions(PROMPTS[0], None)
    stacks = [
        demo.looks[name, 1.0, PROMPTS[0]].drawing(0.0)
        for name in ("stripes", "outline", "both", "spiral")
    ]
    files = list({use.lora.identity: use.lora for stack in stacks for use in stack}.values())
    rows = Rows(parts.engine, component="unet")
    times: dict[str, list[float]] = {"one stack": [], "four presets": []}
    with rows.opened():
        rows.use(stacks, files)
        for _ in range(rounds):
            for name, used in (("one stack", [stacks[2]] * 4), ("four presets", stacks)):
                frames = [stream.blank(conditions, step) for step in range(4)]
                rows.use(used, files if name == "four presets" else ())
                times[name].append(milliseconds(lambda f=frames: stream.step(f)))  # type: ignore[misc]
    figures: dict[str, Any] = {
        f"{name}, batch of 4, ms": median(values) for name, values in times.items()
    }
    figures["four presets / one stack"] = median(
        [four / one for one, four in zip(times["one stack"], times["four presets"], strict=True)]
    )
    key, both = ("stripes", 1.0, PROMPTS[0]), {}
    for name, batched in (("one by one", False), ("stream batch", True)):
        painter = demo.painter(4, done, stream_batch=batched)
        painter.warm(demo.looks[key])
        for seq in range(4):
            painter.draw(demo.ticket(key, 0, seq))
        both[name] = median(
            [
                milliseconds(lambda s=seq, p=painter: p.draw(demo.ticket(key, 0, s)))  # type: ignore[misc]
                for seq in range(rounds)
            ]  # type: ignore[misc]
        )
        painter.drain()
        painter.close()
    figures |= {f"{name}, 4 steps, ms a frame": value for name, value in both.items()}
    figures["stream batch, times faster"] = round(both["one by one"] / both["stream batch"], 2)
    return figures


def measure_both(engine: LoraEngine, pipeline: Any, folder: Path, rounds: int) -> dict[str, Any]:
    """Switches between two LoRAs of rank 16 over the UNet's attention: ours, then peft's."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [write_lora(pipeline.unet, folder, 16, "bfloat16", seed) for seed in range(2)]
    files = [load(path, engine.key_map, path.stem, mapped=True) for path in paths]
    first, second = ([LoraUse(file, 0.7)] for file in files)
    ours = measure_switches(engine, first, second, rounds)
    return {"ours": ours, "diffusers + peft": measure_peft(pipeline, paths, rounds)}


def main() -> None:
    """Measures, prints, and writes the result, with its table in docs/live.md."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--switches", type=int, default=10_000, help="101 or more")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--megabytes", type=int, default=200, help="of each LoRA that is fetched")
    parser.add_argument("--full", action="store_true", help="SDXL's UNet, too: 5 GB of memory")
    parser.add_argument("--folder", type=Path, default=Path("out/bench-live"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    cache = options.folder / "loras"
    cache.mkdir(parents=True, exist_ok=True)
    demo = new_demo(cache)
    figures: dict[str, Any] = {"load average at the start": round(os.getloadavg()[0], 1)}

    def note(name: str, value: Any) -> None:
        figures[name] = value
        log.info("%s: %s", name, value)
        write_result("live", figures)

    base = demo.worker.parts.pipeline.base
    plain = StableDiffusionXLPipeline(**base.components, add_watermarker=False)
    note(
        "switch, demo",
        measure_both(demo.worker.parts.engine, plain, options.folder / "narrow", options.rounds),
    )
    demo = new_demo(cache)  # peft has put its own layers into the model
    worker = demo.worker
    note("batches", measure_batches(demo, options.rounds))
    note("wire, 512 px", asyncio.run(measure_wire(worker, 10.0)))
    note("after a session, the next", asyncio.run(measure_recovery(worker, options.rounds // 5)))
    loading = measure_loading(worker, options.folder, options.megabytes)
    note("while a LoRA is fetched", asyncio.run(loading))
    if options.full:
        full = new_bench("cpu", tiny=False)  # bfloat16, random weights
        note(
            "switch, SDXL's UNet",
            measure_both(full.engine, full.pipeline, options.folder, options.rounds),
        )
        del full
        gc.collect()
    for name, value in run_checks(cache, options.frames, options.switches).items():
        note(name, value)
    note("load average at the end", round(os.getloadavg()[0], 1))
    fill_in("live.md", "live", table(figures))


def table(figures: dict[str, Any]) -> str:
    """The figures for docs/live.md."""
    parts = [("demo model", figures["switch, demo"])]
    if "switch, SDXL's UNet" in figures:
        parts.append(("SDXL's UNet", figures["switch, SDXL's UNet"]))
    names = " / ".join(name for name, _ in parts)

    def both(key: str) -> str:
        sides = ("ours", "diffusers + peft")
        return " | ".join(
            " / ".join(f"{part[s][key]:.1f}" for _, part in parts) + " ms" for s in sides
        )

    one, batch, wire = (figures[name] for name in ("one by one", "stream batch", "wire, 512 px"))
    batches, loading = figures["batches"], figures["while a LoRA is fetched"]
    memory = [
        f"{found['growth MB']} {name} ({found['switches']:,})"
        for name, found in figures["memory"].items()
    ]
    after = [
        f"{found['median ms']} ms ({name})"
        for name, found in figures["after a session, the next"].items()
    ]
    intervals = [
        f"{loading[f'p95 / median {when}']} times, of {loading[f'intervals {when}']:,}"
        for when in ("while fetched and parsed", "after the last byte")
    ]
    rows = [
        f"a switch, {names} | {both('switch ms')}",
        f"a changed strength, {names} | {both('strength ms')}",
        f"{one['asked']:,} frames of 7 presets at random, one by one, against each alone | "
        f"{one['differ']} differ |",
        f"the same in a stream batch, against a stream all under its look | {batch['differ']} differ |",
        f"four presets in a batch of four, against one stack | "
        f"{batches['four presets / one stack']} times |",
        f"a stream batch of 4 steps, against one by one | "
        f"{batches['stream batch, times faster']} times faster |",
        f"512 pixels as JPEG both ways, without a model | {wire['frames per second']:.0f} frames/s, "
        f"{wire['round trip, median ms']} ms |",
        f"longest intervals (p95) while {loading['megabytes each']} MB are fetched and parsed, "
        f"against the median | {intervals[0]} |",
        f"of these, after the last byte | {intervals[1]} |",
        f"the next session's first frame, after what befell the one before | {', '.join(after)} |",
        f"memory after switches with random strengths, above that after 100, MB | {', '.join(memory)} |",
    ]
    return "\n".join(
        [
            "| | the worker | diffusers + peft |",
            "| --- | --- | --- |",
            *(f"| {row} |" for row in rows),
        ]
    )


if __name__ == "__main__":
    main()
