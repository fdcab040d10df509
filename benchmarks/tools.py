"""The tools on two models of SDXL's full size: `make bench-tools` (or `python -m benchmarks.tools`).

Two UNets in bfloat16, in shards of 2 GB, under build/bench/tools: random weights, and the same with a planted
change of low rank under noise. Measured, each in a process of its own so that its peak of memory is told:

- a LoRA of rank 32 extracted, against whole SVDs of the same differences: one layer of each shape, times
  how many layers have that shape;
- that LoRA merged, against a plain copy of the model's files to the same disk, just before;
- a LoRA of rank 128 over the 722 linear layers of the attention blocks, resized to 32, against whole SVDs
  of its products, sampled likewise.

Writes `benchmarks/results/tools.json`, the table in docs/benchmarks.md and its plot.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.full_size import CONFIG, write_lora
from benchmarks.tools_page import keep
from demo.networks import TOPOLOGY, new_unet
from lora.engine.stack import LoraUse
from lora.formats.adapter import load
from lora.formats.names.slots import Shape
from lora.tools.adapters.saving import WriteOptions
from lora.tools.extract.options import ExtractOptions, takes_factors
from lora.tools.extract.run import extract
from lora.tools.factors.ranks import RankPolicy
from lora.tools.factors.svd import energy, truncated_svd
from lora.tools.merge import MergeOptions, merge
from lora.tools.models.checkpoints import Checkpoint, Place
from lora.tools.resize import ResizeOptions, resize

log = logging.getLogger("tools")

RANK, LARGE_RANK = 32, 128

PLANTED, SIZE, NOISE = 24, 0.05, 0.002
"""The planted rank, and the change's and the noise's size beside the weights'; bfloat16 adds its own."""


@dataclass(frozen=True)
class Folders:
    """Where everything lies."""

    root: Path

    @property
    def source(self) -> Path:
        """The model."""
        return self.root / "source"

    @property
    def target(self) -> Path:
        """The changed one."""
        return self.root / "target"

    @property
    def lora(self) -> Path:
        """What is extracted."""
        return self.root / "lora.safetensors"

    @property
    def merged(self) -> Path:
        """The model with it."""
        return self.root / "merged"

    @property
    def copy(self) -> Path:
        """The model, copied."""
        return self.root / "copy"


def make_models(folders: Folders, *, tiny: bool) -> None:
    """Both models, unless they are there."""
    if not folders.source.exists():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        try:
            unet = new_unet() if tiny else UNet2DConditionModel(**TOPOLOGY, **CONFIG)
        finally:
            torch.set_default_dtype(torch.float32)
        part = folders.root / "source.part"
        unet.to(torch.bfloat16).save_pretrained(part, max_shard_size="1MB" if tiny else "2GB")
        part.rename(folders.source)
    if not folders.target.exists():
        part = folders.root / "target.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for file in sorted(folders.source.iterdir()):
            if file.suffix == ".safetensors":
                save_file(_changed(load_file(file)), part / file.name, {"format": "pt"})
            else:
                shutil.copyfile(file, part / file.name)
        part.rename(folders.target)


def _changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(tensors))

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    changed = {}
    for name, tensor in tensors.items():
        weight = tensor.float()
        size = float(weight.std(correction=0)) or 0.01
        if weight.dim() >= 2:
            rows = weight.flatten(1)
            low = noise(rows.shape[0], PLANTED) @ noise(PLANTED, rows.shape[1]) / PLANTED**0.5
            weight = weight + SIZE * size * low.reshape(weight.shape)
        changed[name] = (weight + NOISE * size * noise(*weight.shape)).to(tensor.dtype)
    return changed


def in_child(work: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """Has it done in a fresh process; adds its seconds and its peak of memory, in GB."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(
        target=_measured, args=(results, torch.get_num_threads(), work, *given)
    )
    process.start()
    while process.is_alive() and results.empty():
        process.join(0.2)
    if results.empty():
        raise RuntimeError(f"{work.__name__} ended with {process.exitcode}")
    found = results.get()
    process.join()
    log.info("%s: %s", work.__name__, found)
    return found


def _measured(results: Any, threads: int, work: Callable[..., dict[str, Any]], *given: Any) -> None:
    torch.set_num_threads(threads)
    before = _peak_gb()
    begun = time.perf_counter()
    found = work(*given)
    seconds = round(time.perf_counter() - begun, 3)
    results.put({**found, "seconds": seconds, "peak_gb": _peak_gb(), "libraries_gb": before})


def _peak_gb() -> float:
    """Of this process' own memory: `ru_maxrss` would begin with what its parent had when it was started."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return round(int(line.split()[1]) * 1024 / 1e9, 3)


def do_extract(folders: Folders) -> dict[str, Any]:
    """A LoRA of rank 32 in float16."""
    folders.lora.unlink(missing_ok=True)
    options = ExtractOptions(RankPolicy(rank=RANK), torch.float16)
    with Checkpoint.open(folders.source) as one, Checkpoint.open(folders.target) as other:
        report = extract(one, other, folders.lora, options)
    return {
        "mb": round(report.bytes / 1e6, 1),
        "layers": len(report.layers),
        "left_out": len(report.left_out),
        "kept": report.kept,
        "relative_error": report.relative_error,
    }


def do_copy(folders: Folders) -> dict[str, Any]:
    """The model's files, to the disk: what a merge would take if it computed nothing."""
    shutil.rmtree(folders.copy, ignore_errors=True)
    shutil.copytree(folders.source, folders.copy)
    for file in folders.copy.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    size = sum(file.stat().st_size for file in folders.copy.iterdir())
    return {"gb": round(size / 1e9, 3)}


def do_merge(folders: Folders) -> dict[str, Any]:
    """The extracted LoRA into the source, in its own dtype and shards."""
    shutil.rmtree(folders.merged, ignore_errors=True)
    with Checkpoint.open(folders.source) as model:
        report = merge(model, [LoraUse(folders.lora)], folders.merged, MergeOptions())
    return {"parameters": report.parameters, "gb": round(report.bytes / 1e9, 3)}


def do_resize(folders: Folders, lora: Path) -> dict[str, Any]:
    """From rank 128 to 32."""
    output = folders.root / "resized.safetensors"
    resize(lora, output, ResizeOptions(RankPolicy(rank=RANK), WriteOptions(overwrite=True)))
    return {"mb": round(output.stat().st_size / 1e6, 1)}


@contextmanager
def timed(figures: dict[str, Any], key: str) -> Iterator[None]:
    """Puts the block's seconds under a key."""
    begun = time.perf_counter()
    yield
    figures[key] = round(time.perf_counter() - begun, 4)


def svds_of_differences(folders: Folders) -> list[dict[str, Any]]:
    """One layer of each shape that becomes factors: ours and a whole SVD of its difference."""
    options = ExtractOptions(RankPolicy(rank=RANK), torch.float16)
    with Checkpoint.open(folders.source) as one, Checkpoint.open(folders.target) as other:
        counts: Counter[Shape] = Counter()
        samples: dict[Shape, Place] = {}
        for place, stored in one.parameters.items():
            if takes_factors(str(place), stored.shape, options):
                counts[stored.shape] += 1
                samples.setdefault(stored.shape, place)
        rows = []
        for shape, place in samples.items():
            change = other.read(place).float() - one.read(place).float()
            rows.append(_svds(shape, counts[shape], change.flatten(1)))
    return rows


def svds_of_products(folders: Folders, lora: Path) -> list[dict[str, Any]]:
    """The same of a LoRA's products, [out, in]."""
    with Checkpoint.open(folders.source) as model:
        file = load(lora, model.key_map(), "")
    counts = Counter(layer.target.parameters["weight"] for layer in file.layers)
    rows: list[dict[str, Any]] = []
    for shape, count in counts.items():
        layer = next(x for x in file.layers if x.target.parameters["weight"] == shape)
        rows.append(_svds(shape, count, layer.algorithm.delta(torch.empty(shape))))
    return rows


def _svds(shape: Shape, count: int, matrix: Tensor) -> dict[str, Any]:
    row: dict[str, Any] = {"shape": list(shape), "count": count}
    with timed(row, "ours_s"):
        found = truncated_svd(matrix, RANK)
    with timed(row, "whole_s"):
        values = torch.linalg.svd(matrix, full_matrices=False).S
    error = energy(matrix - (found.up * found.s) @ found.down)
    best = float(values[RANK:].double().square().sum())
    row["error_beside_best"] = round((error / best) ** 0.5, 5) if best else 1.0
    log.info("%s", row)
    return row


def measure(folders: Folders, *, tiny: bool) -> dict[str, Any]:
    """All figures."""
    unet = new_unet() if tiny else _meta_unet()
    lora = write_lora(unet, folders.root, LARGE_RANK)
    figures: dict[str, Any] = {"rank": RANK, "threads": torch.get_num_threads()}
    figures["extract"] = in_child(do_extract, folders)
    figures["copy"] = in_child(do_copy, folders)
    figures["merge"] = in_child(do_merge, folders)
    figures["resize"] = in_child(do_resize, folders, lora)
    figures["svds_of_differences"] = svds_of_differences(folders)
    figures["svds_of_products"] = svds_of_products(folders, lora)
    for name in ("differences", "products"):
        rows = figures[f"svds_of_{name}"]
        for who in ("ours", "whole"):
            added = sum(row[f"{who}_s"] * row["count"] for row in rows)
            figures[f"svds_of_{name}_{who}_s"] = round(added, 2)
    for folder in (folders.copy, folders.merged):
        shutil.rmtree(folder)
    return figures


def _meta_unet() -> Any:
    """Shapes alone."""
    with torch.device("meta"):
        return UNet2DConditionModel(**TOPOLOGY, **CONFIG)


def main() -> None:
    """Makes the models unless they are there, measures, writes the result and the page."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tiny", action="store_true", help="a narrow model, to see whether it runs"
    )
    parser.add_argument("--folder", type=Path, default=Path("build/bench/tools"))
    options = parser.parse_args()
    root: Path = options.folder / ("tiny" if options.tiny else "full")
    root.mkdir(parents=True, exist_ok=True)
    folders = Folders(root)
    make_models(folders, tiny=options.tiny)
    figures = measure(folders, tiny=options.tiny)
    log.info("written to %s", keep(figures, tiny=options.tiny))


if __name__ == "__main__":
    main()
