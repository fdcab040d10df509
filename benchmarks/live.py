"""Live frames on the demo model: `make bench-live` (`python -m benchmarks.live`); `--full` adds SDXL's UNet.

Measured: frames under a random order of presets, strengths and prompts against each alone, bit for bit; the
milliseconds of a switch and of a changed strength, beside diffusers + peft in the same run; memory over many
switches; four presets in one batch; a stream batch against one frame after the other; intervals while a large
LoRA is fetched; the wire without a model. Times of one thread are its CPU seconds (`thread_time`), so that
what else the machine does does not count; those of sessions are wall seconds. Writes
`benchmarks/results/live.json`, with the load of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from benchmarks.full_size import write_lora
from benchmarks.live_demo import PICTURES, PROMPTS, Demo, median, milliseconds, new_demo
from benchmarks.live_wire import measure_loading, measure_wire
from benchmarks.lora_engine import new_bench
from benchmarks.report import write_result
from live.monitor import memory_mb
from live.painter import Drawn
from lora.engine.engine import Block, LoraEngine
from lora.engine.rows import Rows
from lora.engine.stack import LoraUse, Mode, Stack
from lora.formats.adapter import load
from pipelines.live import LiveStream, Spec, spread

log = logging.getLogger("live")


def measure_frames(demo: Demo, count: int, *, stream_batch: bool) -> dict[str, Any]:
    """Frames in a random order against each look alone: how many differ, and whether weights are exact."""
    networks = demo.worker.parts.pipeline.components.values()
    before = [{n: p.detach().clone() for n, p in one.state_dict().items()} for one in networks]
    chance, done = random.Random(5), list[Drawn]()
    order = [(chance.choice(list(demo.looks)), chance.randrange(PICTURES)) for _ in range(count)]
    painter = demo.painter(2, done, stream_batch=stream_batch)
    for look in demo.looks.values():
        painter.warm(look)
    alone: dict[Any, bytes] = {}
    for key in demo.looks:
        done.clear()
        for picture in range(PICTURES):
            painter.draw(demo.ticket(key, picture, picture))
        painter.drain()
        alone |= {(key, one.ticket.waiting.seq): one.image.tobytes() for one in done}
    done.clear()
    for seq, (key, picture) in enumerate(order):
        painter.draw(demo.ticket(key, picture, seq))
    painter.drain()
    painter.close()
    differ = sum(one.image.tobytes() != alone[order[one.ticket.waiting.seq or 0]] for one in done)
    exact = all(
        torch.equal(tensor, kept[name])
        for one, kept in zip(networks, before, strict=True)
        for name, tensor in one.state_dict().items()
    )
    return {"frames": len(done), "asked": count, "differ": differ, "weights exact": exact}


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


def measure_memory(demo: Demo, counts: dict[str, int]) -> dict[str, Any]:
    """Growth of this process between 100 switches with random strengths and many, in every mode."""
    parts, chance = demo.worker.parts, random.Random(2)
    keys = [
        key for key in demo.looks if key[1] == 1.0 and key[2] == PROMPTS[0] and key[0] != "none"
    ]

    def stack_of(*, low_rank: bool) -> Stack:
        names = [key for key in keys if key[0] != "night"] if low_rank else keys
        uses = demo.looks[chance.choice(names)].drawing(0.0)
        return [replace(use, scale=0.01 + 1.5 * chance.random()) for use in uses]

    def growth(switch: Callable[[], None], count: int) -> dict[str, float]:
        for _ in range(100):
            switch()
        gc.collect()
        begun = memory_mb() or 0.0
        for _ in range(count - 100):
            switch()
        gc.collect()
        return {"switches": count, "growth MB": round((memory_mb() or 0.0) - begun, 1)}

    figures = {}
    for mode in (Mode.DYNAMIC, Mode.MERGED):
        parts.engine.free()
        with parts.engine.applied([], mode) as block:

            def switch(block: Block = block) -> None:
                block.switch(stack_of(low_rank=False))

            figures[mode.value] = growth(switch, counts[mode.value])
    rows = Rows(parts.engine, component="unet")
    files = list(
        {
            use.lora.identity: use.lora
            for k in keys
            if k[0] != "night"
            for use in demo.looks[k].stack
        }.values()
    )
    with rows.opened():

        def use() -> None:
            rows.use([stack_of(low_rank=True) for _ in range(4)], files)

        figures["rows"] = growth(use, counts["rows"])
    return figures


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
    """Measures, prints, and writes the result."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--switches", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--full", action="store_true", help="SDXL's UNet, too: 5 GB of memory")
    parser.add_argument("--folder", type=Path, default=Path("out/bench-live"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    demo = new_demo(options.folder / "loras")
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
    demo = new_demo(options.folder / "loras")  # peft has put its own layers into the model
    note("batches", measure_batches(demo, options.rounds))
    note("wire, 512 px", asyncio.run(measure_wire(demo.worker, 10.0)))
    note("while 200 MB are fetched", asyncio.run(measure_loading(demo.worker, options.folder)))
    if options.full:
        full = new_bench("cpu", tiny=False)  # bfloat16, random weights
        note(
            "switch, SDXL's UNet",
            measure_both(full.engine, full.pipeline, options.folder, options.rounds),
        )
        del full
        gc.collect()
    note("one by one", measure_frames(demo, options.frames, stream_batch=False))
    note("stream batch", measure_frames(demo, options.frames, stream_batch=True))
    many = options.switches
    counts = {"dynamic": many, "merged": max(200, many // 10), "rows": many}
    note("memory", measure_memory(demo, counts))
    note("load average at the end", round(os.getloadavg()[0], 1))


if __name__ == "__main__":
    main()
