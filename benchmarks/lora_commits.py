"""The LoRA engine at two commits, in turns: `python -m benchmarks.lora_commits BEFORE`.

They take turns, each time in a fresh process. Files of rank 16 over SDXL's 722 linear layers are loaded for a
model of that size on `meta`, in kohya's and in diffusers' names; the demo's LoRA is applied to its model and
taken back. Writes the medians and their ratios to `benchmarks/results/lora_commits.json`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from benchmarks.clones import ROOT, commit
from benchmarks.full_size import CONFIG, linear_layers, write_lora
from benchmarks.report import write_result
from demo.networks import TOPOLOGY

log = logging.getLogger("lora_commits")

RANK, IN_A_PROCESS = 16, 15

PROGRAM = """
import json, sys, time
from collections import defaultdict
from pathlib import Path
import torch
from diffusers import UNet2DConditionModel
from benchmarks.full_size import CONFIG
from demo.networks import TOPOLOGY
from lora.engine.engine import LoraEngine
from lora.engine.stack import LoraUse, Mode
from lora.formats.adapter import load
with torch.device("meta"):
    large = LoraEngine({"unet": UNet2DConditionModel(**TOPOLOGY, **CONFIG)})
small = LoraEngine({"unet": UNet2DConditionModel.from_pretrained("demo/model/unet").requires_grad_(False)})
stripes = load(Path("demo/loras/demo-stripes.safetensors"), small.key_map, "stripes")
seconds = defaultdict(list)
def timed(figure, work):
    begun = time.perf_counter()
    found = work()
    seconds[figure].append(time.perf_counter() - begun)
    return found
for number in range(int(sys.argv[1]) + 1):  # the first is not counted
    for path in map(Path, sys.argv[2:]):
        timed(f"{path.stem}: loaded", lambda: load(path, large.key_map, path.stem, mapped=True))
    for mode in Mode.DYNAMIC, Mode.MERGED:
        block = small.applied([LoraUse(stripes, 1 + number / 100)], mode)
        timed(f"demo, {mode.value}: another scale", block.__enter__)
        timed(f"demo, {mode.value}: taken back", lambda: block.__exit__(None, None, None))
print(json.dumps({figure: times[1:] for figure, times in seconds.items()}))
"""


def write_files(folder: Path) -> list[Path]:
    """A LoRA over all linear layers in kohya's names, and the same in diffusers'."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**TOPOLOGY, **CONFIG)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "diffusers.safetensors"
    if not path.exists():
        shapes = {
            f"unet.{name}.lora_{side}.weight": shape
            for name, module in linear_layers(unet)
            for side, shape in (
                ("A", (RANK, module.in_features)),
                ("B", (module.out_features, RANK)),
            )
        }
        tensors = {key: torch.randn(shape).half() / 100 for key, shape in shapes.items()}
        save_file(tensors, path)
    return [write_lora(unet, folder, RANK), path]


def measured(tree: Path, files: list[Path]) -> dict[str, list[float]]:
    """Figure -> seconds, in a fresh process of the commit that lies in `tree`."""
    arguments = [str(IN_A_PROCESS), *(str(path.resolve()) for path in files)]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measures both commits in turns, and writes the result."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", help="the commit beside which this one is measured")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    files = write_files(options.folder)
    seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with commit(options.before) as tree:
        turn = {"before": tree, "now": ROOT}
        for number in range(options.rounds):
            log.info("round %d of %d", number + 1, options.rounds)
            for who in sorted(turn, reverse=bool(number % 2)):
                for figure, times in measured(turn[who], files).items():
                    seconds[figure][who] += times
    figures = {}
    for figure, both in seconds.items():
        before, now = (1000 * statistics.median(both[who]) for who in ("before", "now"))
        figures[figure] = {
            "before ms": round(before, 2),
            "now ms": round(now, 2),
            "now / before": round(now / before, 3),
        }
        log.info("%s: %s", figure, figures[figure])
    load = round(os.getloadavg()[0], 1)
    about = {"before": options.before, "rounds": options.rounds, "load average at the end": load}
    log.info("written to %s", write_result("lora_commits", {**about, "medians": figures}))


if __name__ == "__main__":
    main()
