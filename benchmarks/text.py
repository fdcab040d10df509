"""Text with many adapters beside PEFT: `make bench-text` (or `python -m benchmarks.text`).

A Llama with random weights and LoRAs of rank 16 over all 7 linear layers of each block. In one run, in turn
on the same weights and files: our scheduler and rows; PEFT's mixed batch (`adapter_names`) and, with one
adapter, its `set_adapter`. What counts are the ratios. Writes `benchmarks/results/text.json`, or
`text_cuda.json` with `--device cuda`, where the model has 0.6 B parameters in bfloat16. On a CPU one thread
is used, and its CPU seconds are counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import write_result
from lora.engine.engine import LoraEngine
from lora.engine.rows import Rows
from lora.engine.stack import LoraUse, Stack
from lora.formats.adapter import LoraFile, load
from lora.formats.peft import config_beside
from text.generation import Generation
from text.loading import COMPONENT, TextModel
from text.sampling import Sampling
from text.scheduler import Scheduler

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16
ADAPTERS = 8


@dataclass(frozen=True)
class Shape:
    """A Llama's size, and how it is measured."""

    width: int
    inner: int
    layers: int
    heads: int
    shared_heads: int
    words: int = 8000
    dtype: torch.dtype = torch.float32
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 24
    new: int = 24


SHAPES = {
    "width 256": Shape(256, 768, 4, 8, 2),
    "width 1024": Shape(1024, 2816, 4, 16, 4),
    "168 layers": Shape(896, 4864, 24, 14, 2, 1000, torch.bfloat16),
    "0.6 B": Shape(
        1024, 3072, 28, 16, 8, 151_936, torch.bfloat16, batches=(1, 8, 32), prompt=64, new=48
    ),
}


class Letters:
    """Stands in for a tokenizer: random weights write no words."""

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        """A letter for each token."""
        return "x" * len(tokens)


def new_model(shape: Shape, device: str) -> LlamaForCausalLM:
    """Random weights of a size that keeps the numbers from growing."""
    config = LlamaConfig(
        vocab_size=shape.words,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.shared_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(shape.dtype).to_empty(device=device)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, parameter.shape[1] ** -0.5)
        else:
            parameter.data.fill_(1.0)
        parameter.requires_grad_(False)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval()


def write_adapter(model: nn.Module, folder: Path, seed: int, rank: int = RANK) -> Path:
    """A LoRA as PEFT saves it, with random factors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.split(".")[-1] in TARGETS:
            down = torch.randn(rank, module.in_features, generator=generator)
            up = torch.randn(module.out_features, rank, generator=generator)
            stem = f"base_model.model.{name}"
            tensors[f"{stem}.lora_A.weight"] = (down * module.in_features**-0.5).bfloat16()
            tensors[f"{stem}.lora_B.weight"] = (up * 0.05).bfloat16()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    config |= {"target_modules": list(TARGETS), "bias": "none", "inference_mode": True}
    config |= {"base_model_name_or_path": "", "lora_dropout": 0.0, "fan_in_fan_out": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@dataclass
class Bench:
    """One model with its adapters, ours and PEFT's on the same weights."""

    shape: Shape
    device: str
    folders: list[Path]
    model: LlamaForCausalLM
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.text = TextModel(
            "bench",
            self.model,
            Letters(),
            frozenset(),
            self.model.config.max_position_embeddings,
            {},
            None,
        )
        self.engine = LoraEngine({COMPONENT: self.model})
        self.files = [self.read(folder) for folder in self.folders]

    def read(self, folder: Path) -> LoraFile:
        """An adapter, read and checked as the worker reads it from its cache, where its hash is known."""
        path = folder / "adapter_model.safetensors"
        config = config_beside(path)
        return load(path, self.engine.key_map, folder.name, config=config, mapped=True)

    def wait(self) -> None:
        """Until the device has done all that it was told."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        """How long it takes: on a GPU in seconds, its work included; on a CPU in CPU seconds."""
        clock = time.perf_counter if self.device == "cuda" else time.process_time
        self.wait()
        begun = clock()
        work()
        self.wait()
        return clock() - begun

    def prompts(self, count: int) -> list[list[int]]:
        """Random tokens."""
        generator = torch.Generator().manual_seed(7)
        size = (count, self.shape.prompt)
        return torch.randint(1, self.shape.words, size, generator=generator).tolist()

    def stack(self, row: int, adapters: int) -> Stack:
        """Row r has adapter r modulo their number."""
        return [LoraUse(self.files[row % adapters])] if adapters else []


def ours(bench: Bench, scheduler: Scheduler, rows: int, adapters: int) -> list[Generation]:
    """All rows at once; returns when all are done."""
    sampling = Sampling(max_tokens=bench.shape.new, temperature=0.0, ignore_eos=True)
    texts = [
        Generation(prompt, sampling, bench.stack(row, adapters))
        for row, prompt in enumerate(bench.prompts(rows))
    ]
    scheduler.submit(*texts)
    for text in texts:
        text.text()
    return texts


@torch.no_grad()
def theirs(bench: Bench, model: Any, rows: int, adapters: int) -> None:
    """One `generate` over all rows: the base, PEFT's active adapter, or PEFT's mixed batch."""
    given = torch.tensor(bench.prompts(rows), device=bench.device)
    mixed = {"adapter_names": [f"a{row % adapters}" for row in range(rows)]} if adapters > 1 else {}
    model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=bench.shape.new,
        min_new_tokens=bench.shape.new,
        do_sample=False,
        pad_token_id=0,
        **mixed,
    )


def with_peft(bench: Bench) -> Any:
    """The same weights in PEFT's wrapper, every adapter loaded, the first one active."""
    twin = _sharing_weights(bench.model, bench.model.config, bench.shape, bench.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(twin, str(bench.folders[0]), adapter_name="a0")
        for number, folder in enumerate(bench.folders[1:], 1):
            model.load_adapter(str(folder), adapter_name=f"a{number}")
    model.set_adapter("a0")
    return model.eval()


def _sharing_weights(model: Any, config: Any, shape: Shape, device: str) -> Any:
    with torch.device("meta"):
        twin = LlamaForCausalLM(config)
    twin = twin.to(shape.dtype)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.tie_weights()
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config).to(device)
    return twin.eval().requires_grad_(False)


def measure_speed(bench: Bench, rounds: int) -> None:
    """Tokens per second, by the size of the batch and the number of adapters, both engines in turn."""
    scheduler = Scheduler(bench.text, bench.engine, most=max(bench.shape.batches))
    peft, plain = with_peft(bench), bench.model
    ours(bench, scheduler, 2, 2)
    theirs(bench, plain, 2, 0)
    theirs(bench, peft, 2, 2)
    table: dict[str, dict[str, float]] = {}
    for rows in bench.shape.batches:
        for adapters in (0, 1, ADAPTERS):
            times: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(rounds):
                times["ours"].append(
                    bench.seconds(lambda n=rows, k=adapters: ours(bench, scheduler, n, k))  # type: ignore[misc]
                )
                model = peft if adapters else plain
                times["theirs"].append(
                    bench.seconds(lambda m=model, n=rows, k=adapters: theirs(bench, m, n, k))  # type: ignore[misc]
                )
            tokens = rows * bench.shape.new
            row = {who: round(tokens / statistics.median(own), 1) for who, own in times.items()}
            table[f"batch {rows}, {adapters} adapters"] = row
            print(
                f"  batch {rows:2}, {adapters} adapters: {row['ours']:8.1f} tokens/s, "
                f"PEFT {row['theirs']:8.1f}",
                flush=True,
            )
    one = bench.seconds(lambda: [ours(bench, scheduler, 1, 1) for _ in range(8)])
    eight = bench.seconds(lambda: ours(bench, scheduler, 8, 1))
    bench.figures["tokens per second"] = table
    bench.figures["at once against one by one, 8 requests"] = round(one / eight, 2)
    ratio = {
        who: round(
            table["batch 8, 0 adapters"][who] / table[f"batch 8, {ADAPTERS} adapters"][who], 2
        )
        for who in ("ours", "theirs")
    }
    bench.figures["8 adapters against the base, batch of 8"] = ratio
    waits = [measure_waits(bench, scheduler) for _ in range(5)]
    bench.figures["longest wait when adapters arrive, in median steps, five times"] = waits
    scheduler.close()


def measure_waits(bench: Bench, scheduler: Scheduler) -> float:
    """The longest wait of running rows while new adapters arrive, against the median step.

    On a CPU in CPU seconds of the scheduler's thread: what others do on this machine is no wait of ours.
    """
    clock = time.perf_counter if bench.device == "cuda" else time.thread_time
    sampling = Sampling(max_tokens=4 * bench.shape.new, temperature=0.0, ignore_eos=True)
    first, *others = bench.prompts(4)
    running = [Generation(first, sampling, bench.stack(row, 2)) for row in range(2)]
    while bench.engine.undo.pending:
        time.sleep(0.005)
    for key in [file.identity for file in bench.files[2:]]:
        scheduler.rows.remove(key)  # so that they arrive as new ones
    turns: list[tuple[float, bool]] = []
    advance = scheduler.batch.advance

    def timed(use: Callable[[Sequence[Stack]], None]) -> None:
        arriving = bool(scheduler.batch.filling)
        advance(use)
        if all(text.tokens and text.finish is None for text in running):
            turns.append((clock(), arriving))

    scheduler.batch.advance = timed  # type: ignore[method-assign]
    scheduler.submit(*running)
    while len(running[1].tokens) < 4:
        time.sleep(0.005)
    arrived = [
        Generation(p, sampling, bench.stack(row + 2, ADAPTERS)) for row, p in enumerate(others)
    ]
    for text in arrived:
        scheduler.submit(text)
        time.sleep(0.05)
    for text in (*running, *arrived):
        text.text()
    scheduler.batch.advance = advance  # type: ignore[method-assign]
    waits = [(now - before, arriving) for (before, _), (now, arriving) in pairwise(turns)]
    step = statistics.median(wait for wait, arriving in waits if not arriving)
    return round(max(wait for wait, _ in waits) / step, 2)


def measure_loading(bench: Bench, rounds: int) -> None:
    """Milliseconds to load, check and bind an adapter; and to come back to one that was used before."""
    peft = with_peft(bench)
    times: dict[str, list[float]] = {}

    def add(name: str, work: Callable[[], object]) -> None:
        gc.collect()
        times.setdefault(name, []).append(1000 * bench.seconds(work))

    rows = Rows(bench.engine)
    for file in bench.files:  # so that no round has to make the layers' buffers larger
        rows.place(file)
    for round_ in range(rounds):
        folder = bench.folders[1 + round_ % (len(bench.folders) - 1)]
        rows.remove(bench.read(folder).identity)
        with rows.opened():
            add(
                "loaded and bound, ours",
                lambda f=folder: rows.use([[LoraUse(bench.read(f))]]),  # type: ignore[misc]
            )
            rows.use([[LoraUse(bench.files[0])]])
            again = bench.read(folder)
            add("back to one, ours", lambda a=again: rows.use([[LoraUse(a)]]))  # type: ignore[misc]
        name = f"r{round_}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            add(
                "loaded and bound, PEFT",
                lambda f=folder, n=name: peft.load_adapter(str(f), adapter_name=n),  # type: ignore[misc]
            )
            peft.set_adapter(name)
            add("back to one, PEFT", lambda: peft.set_adapter("a0"))
            peft.delete_adapter(name)
    layers = sum(
        isinstance(m, nn.Linear) and n.split(".")[-1] in TARGETS
        for n, m in bench.model.named_modules()
    )
    for name, own in times.items():
        bench.figures[f"{name}, ms"] = round(statistics.median(own), 2)
        print(f"  {name}: {statistics.median(own):.2f} ms ({layers} layers)", flush=True)


def main() -> None:
    """Measures, prints, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    if not cuda:
        torch.set_num_threads(1)
    chosen = ["0.6 B"] if cuda else ["width 256", "width 1024", "168 layers"]
    results: dict[str, Any] = {"rank": RANK, "device": _device_name(options.device)}
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            print(name, flush=True)
            model = new_model(SHAPES[name], options.device)
            paths = [write_adapter(model, Path(folder) / name / str(n), n) for n in range(ADAPTERS)]
            bench = Bench(SHAPES[name], options.device, paths, model)
            if name != "168 layers":  # half a billion parameters take minutes on a CPU
                measure_speed(bench, 2 if cuda else options.rounds)
            measure_loading(bench, options.rounds)
            results[name] = bench.figures
            print(json.dumps({k: v for k, v in bench.figures.items() if k != "tokens per second"}))
    print("written to", write_result("text_cuda" if cuda else "text", results))


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu, 1 thread"


if __name__ == "__main__":
    main()
