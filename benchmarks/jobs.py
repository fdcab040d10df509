"""What a job costs beside its drawing, and what a cold start costs: `make bench-jobs`.

Real workers on the emulator, on the demo model at 64 pixels: jobs one after the other, each with its LoRAs in
the cache. A job's time from taking to answer is split by the worker's own timings: drawing (the prompt
encoded, denoised, decoded), our share (checking, finding the LoRAs, applying, restoring, encoding, posting),
and what the SDK waits before it calls the handler. A cold start is measured in fresh processes, by parts.
Writes `benchmarks/results/jobs.json` and its part of docs/deployment.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, fill_in, write_result
from tests.emulator.running import Emulator
from tests.production import ENVIRONMENT, platform

log = logging.getLogger("jobs")

DRAWING = ("encode_prompt", "denoise", "decode")

JOB: dict[str, Any] = {
    "prompt": "a big red circle on a blue background",
    "num_inference_steps": 4,
    "width": 64,
    "height": 64,
    "seed": 7,
}

KINDS: dict[str, dict[str, Any]] = {
    "no LoRA": {},
    "one LoRA, dynamic": {"loras": ["demo-stripes"], "lora_mode": "dynamic"},
    "one LoRA, merged": {"loras": ["demo-stripes"], "lora_mode": "merged"},
    "two LoRAs, another scale each time": {
        "loras": [{"path": "demo-stripes", "scale": 0.5}, "demo-outline"],
        "lora_mode": "dynamic",
    },
}

COLD = """
import time
begun = time.perf_counter()
def lap():
    global begun
    now = time.perf_counter()
    found, begun = now - begun, now
    return found
import handler, runpod
found = {"imports": lap()}
worker = handler.default_worker()
found["the model loaded, the cache opened"] = lap()
job = {"id": "1", "input": JOB}
first = worker(job)
found["the first job"] = lap()
worker(job)
found["the second job"] = lap()
assert "images" in first, first
import json
print(json.dumps(found))
"""


def measure(running: Emulator, kind: str, count: int) -> dict[str, list[float]]:
    """Milliseconds by part, of each of `count` jobs of a kind, one after the other."""
    found: dict[str, list[float]] = {}
    for number in range(count + 2):
        values = json.loads(json.dumps({**JOB, **KINDS[kind]}))
        if "another scale" in kind:
            values["loras"][0]["scale"] = 0.5 + number / 1000
        job_id = running.run(values)
        state = running.end(job_id)
        if number >= 2:  # the first ones prepare the stack
            for part, seconds in _parts(running, job_id, state["output"]["timings"]).items():
                found.setdefault(part, []).append(1000 * seconds)
    return found


def _parts(running: Emulator, job_id: str, timings: dict[str, float]) -> dict[str, float]:
    """Seconds of one job by what they went to."""
    story, line = running.story(job_id), _line_of(running, job_id)
    monotonic = time.monotonic() - time.time()
    returned = datetime.fromisoformat(line["time"]).timestamp() + monotonic
    drawing = sum(timings[phase] for phase in DRAWING)
    post = max(0.0, story["ended"] - returned)
    parts = {phase: timings[phase] for phase in timings if phase not in (*DRAWING, "download")}
    return {
        **parts,
        "post": post,
        "in all": line["seconds"] - drawing - timings["download"] + post,
        "drawing": drawing,
        "the SDK's wait": returned - line["seconds"] - story["started"],
    }


def _line_of(running: Emulator, job_id: str) -> dict[str, Any]:
    """What the worker logged of a job's end."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for text in reversed(running.log().splitlines()):
            if job_id in text and '"event": "job"' in text:
                found: dict[str, Any] = json.loads(text[text.index("{") :])
                return found
        time.sleep(0.02)
    raise RuntimeError(f"the worker logged no end of {job_id}")


def cold_start() -> dict[str, float]:
    """Seconds by part, in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", COLD.replace("JOB", repr(JOB))],
            env={**os.environ, **ENVIRONMENT, "LORA_CACHE_DIR": folder},
            capture_output=True,
            text=True,
            check=True,
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_page(result: dict[str, Any]) -> None:
    """Puts the tables into docs/deployment.md."""
    machine, figures = result["machine"], result["figures"]
    parts = list(next(iter(figures["milliseconds"].values())))
    lines = [
        f"{result['date']}, {machine['cpu']}, {machine['cores']} cores; the demo model at 64 pixels on the "
        f"emulator, one worker, one thread; medians of {figures['jobs']} jobs, in milliseconds.",
        "",
        "| | " + " | ".join(figures["milliseconds"]) + " |",
        "| --- |" + " --- |" * len(figures["milliseconds"]),
    ]
    for part in parts:
        values = [f"{kind[part]:.1f}" for kind in figures["milliseconds"].values()]
        lines.append(f"| {part} | " + " | ".join(values) + " |")
    lines += ["", "| a cold start of the demo model, by parts | seconds |", "| --- | --- |"]
    lines += [f"| {part} | {seconds:.2f} |" for part, seconds in figures["cold_start"].items()]
    fill_in("deployment.md", "jobs", "\n".join(lines))


def main() -> None:
    """Measures, writes the result and the page."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=40, help="of each kind")
    parser.add_argument("--starts", type=int, default=5)
    options = parser.parse_args()
    milliseconds: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, platform(Path(folder), workers=1) as running:
        for kind in KINDS:
            found = measure(running, kind, options.jobs)
            milliseconds[kind] = {
                part: round(statistics.median(values), 2) for part, values in found.items()
            }
            log.info("%s: %.1f ms beside drawing", kind, milliseconds[kind]["in all"])
    starts = [cold_start() for _ in range(options.starts)]
    cold = {part: round(statistics.median(s[part] for s in starts), 3) for part in starts[0]}
    log.info("cold start: %s", cold)
    figures = {"jobs": options.jobs, "milliseconds": milliseconds, "cold_start": cold}
    path = write_result("jobs", figures)
    write_page(json.loads((RESULTS / "jobs.json").read_text()))
    log.info("written to %s", path)


if __name__ == "__main__":
    main()
