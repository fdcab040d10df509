"""`make demo`: JSON jobs through the real handler and RunPod's own SDK, on the embedded model.

Leaves in `out/` every picture, every answer, and `sheet.png`: plain, each LoRA, two stacked, plain again.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from handler import Worker
from settings import Settings

OUT = Path("out")
LORAS = Path(__file__).parent / "loras"
STEPS = 20

COLUMNS: tuple[tuple[str, list[Any], str | None], ...] = (
    # title, loras, the shape that the prompt names instead of its own
    ("no LoRA", [], None),
    ("stripes", ["demo-stripes.safetensors"], None),
    ("outline", [{"path": "demo-outline", "scale": 1.0}], None),
    ("night", ["demo-night"], None),
    ("spiral", ["demo-spiral"], "spiral"),
    ("stripes + outline", ["demo-stripes", "demo-outline"], None),
    ("no LoRA again", [], None),
)
PROMPTS = (
    ("a big red {} on a blue background", "circle", 1),
    ("a big yellow {} on a purple background", "star", 2),
    ("a big purple {} on a yellow background", "square", 5),
)
TILE = 160


def make_jobs() -> list[dict[str, Any]]:
    """The demo's jobs, row by row of the sheet, as a client would send them."""
    return [
        {
            "id": f"{title.replace(' ', '-')}-{row}",
            "input": {
                "prompt": prompt.format(shape or own),
                "loras": loras,
                "seed": seed,
                "scheduler": "K_EULER",
                "num_inference_steps": STEPS,
                "guidance_scale": 3.0,
            },
        }
        for row, (prompt, own, seed) in enumerate(PROMPTS)
        for title, loras, shape in COLUMNS
    ]


def run(jobs: list[dict[str, Any]], worker: Worker, bar: tqdm[Any]) -> list[dict[str, Any]]:
    """Every job through the SDK's own `run_job`, as production calls a handler."""
    from runpod.serverless.modules import rp_job

    rp_job.log.set_level("ERROR")
    results = []
    for job in jobs:
        bar.set_description(f"{job['id']:<22}")
        result = asyncio.run(rp_job.run_job(worker, job))
        if "error" in result:
            raise RuntimeError(f"{job['id']}: {result['error']}")
        results.append(result["output"])
    return results


def save(job: Mapping[str, Any], answer: Mapping[str, Any]) -> Image.Image:
    """Writes the picture and, beside it, the job and its answer without the picture's bytes."""
    data = base64.b64decode(answer["image_url"].split(",", 1)[1])
    path = OUT / f"{job['id']}.png"
    path.write_bytes(data)
    told = {**answer, "images": [path.name], "image_url": path.name}
    path.with_suffix(".json").write_text(json.dumps({**job, "output": told}, indent=2) + "\n")
    return Image.open(path)


def make_sheet(pictures: list[Image.Image]) -> Image.Image:
    """All pictures in one, a column for each way to draw and a row for each prompt."""
    gap, head = 8, 26
    width = len(COLUMNS) * (TILE + gap) + gap
    sheet = Image.new("RGB", (width, head + len(PROMPTS) * (TILE + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, len(COLUMNS))
        x, y = gap + column * (TILE + gap), head + row * (TILE + gap)
        sheet.paste(picture.resize((TILE, TILE), Image.Resampling.BICUBIC), (x, y))
        if row == 0:
            pen.text((x + TILE / 2, head / 2), COLUMNS[column][0], "black", font, anchor="mm")
    return sheet


def main() -> int:
    """Runs the jobs, writes `out/`; 1 if the last plain picture differs from the first."""
    logging.basicConfig(level=logging.WARNING)
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.copytree(LORAS, OUT / "loras")
    jobs = make_jobs()
    with tqdm(total=len(jobs) * STEPS, unit="step", desc="loading the model") as bar:

        def show(job: Mapping[str, Any], update: Mapping[str, Any]) -> None:
            if update["phase"] == "generating":
                done = next(i for i, j in enumerate(jobs) if j["id"] == job["id"])
                bar.update(done * STEPS + round(update["fraction"] * STEPS) - bar.n)

        worker = Worker(Settings(model="demo", lora_cache_dir=OUT / "loras"), show).setup()
        begun = time.perf_counter()
        answers = run(jobs, worker, bar)
    pictures = [save(job, answer) for job, answer in zip(jobs, answers, strict=True)]
    make_sheet(pictures).save(OUT / "sheet.png")
    last = len(COLUMNS) - 1
    same = all(
        pictures[row * len(COLUMNS)].tobytes() == pictures[row * len(COLUMNS) + last].tobytes()
        for row in range(len(PROMPTS))
    )
    print(f"{len(jobs)} jobs in {time.perf_counter() - begun:.1f} s -> {OUT / 'sheet.png'}")
    print(
        "The plain pictures before and after the LoRAs are", "identical." if same else "DIFFERENT."
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
