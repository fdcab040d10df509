"""What a job costs beside its drawing: `make bench-jobs`, or `python -m benchmarks.jobs [BEFORE]`.

Real workers on the emulator, the demo model at 64 pixels: jobs one after the other, their LoRAs in the cache.
A job's time from taking to answer is split by the worker's own timings: drawing (the prompt encoded,
denoised, decoded), our share (checking, finding the LoRAs, applying, restoring, encoding, posting), and what
the SDK waits before it calls the handler. Where a commit BEFORE is named, its worker takes turns with this
one's in the same run, each under an emulator of its own. Writes `benchmarks/results/jobs.json` and its part
of docs/deployment.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.clones import ROOT, commit
from benchmarks.report import RESULTS, fill_in, write_result
from tests.emulator.running import Emulator
from tests.production import platform

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


@contextmanager
def serving(tree: Path) -> Iterator[Emulator]:
    """An emulator with one worker of the commit that lies in `tree`."""
    program = (str(tree / "handler.py"),)
    with TemporaryDirectory() as folder, platform(Path(folder), workers=1, program=program) as one:
        yield one


def measured(
    workers: Mapping[str, Emulator], rounds: int, count: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Worker -> kind -> part -> the median of its milliseconds. In each round each worker gets `count` jobs
    of each kind.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for number in range(rounds):
        for kind in KINDS:
            for name, running in workers.items():
                parts = found.setdefault(name, {}).setdefault(kind, {})
                for part, values in measure(running, kind, count, number * count).items():
                    parts.setdefault(part, []).extend(values)
    return {
        name: {
            kind: {part: round(statistics.median(values), 2) for part, values in parts.items()}
            for kind, parts in kinds.items()
        }
        for name, kinds in found.items()
    }


def measure(running: Emulator, kind: str, count: int, first: int = 0) -> dict[str, list[float]]:
    """Milliseconds by part, of each of `count` jobs of a kind, one after the other. `first`: a number that no
    earlier job of the kind had.
    """
    found: dict[str, list[float]] = {}
    for number in range(count + 2):
        values = json.loads(json.dumps({**JOB, **KINDS[kind]}))
        if "another scale" in kind:
            values["loras"][0]["scale"] = 0.5 + (first + number) / 1000
        state = running.post("runsync", json={"input": values})  # nobody asks while it draws
        if number >= 2:  # the first ones prepare the stack
            for part, seconds in _parts(running, state["id"], state["output"]["timings"]).items():
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


def write_page(result: dict[str, Any]) -> None:
    """Puts the table into docs/deployment.md: each figure, and behind it in brackets that of before."""
    machine, figures = result["machine"], result["figures"]
    now, before = figures["milliseconds"]["now"], figures["milliseconds"].get("before", {})
    lines = [
        f"{result['date']}, {machine['cpu']}, {machine['cores']} cores; the demo model at 64 pixels on the "
        f"emulator, one worker, one thread; medians of {figures['jobs']} jobs, in milliseconds"
        + (f"; in brackets commit {figures['before']} in the same minutes." if before else "."),
        "",
        "| | " + " | ".join(now) + " |",
        "| --- |" + " --- |" * len(now),
    ]
    for part in next(iter(now.values())):
        cells = [
            f"{now[kind][part]:.1f}" + (f" ({before[kind][part]:.1f})" if before else "")
            for kind in now
        ]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    fill_in("deployment.md", "jobs", "\n".join(lines))


def main() -> None:
    """Measures, writes the result and the page."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", nargs="?", help="a commit to compare with")
    parser.add_argument("--jobs", type=int, default=40, help="of each kind")
    parser.add_argument(
        "--rounds", type=int, default=4, help="between which the commits take turns"
    )
    parser.add_argument("--dry", action="store_true", help="only print")
    options = parser.parse_args()
    with ExitStack() as stack:
        trees = {"now": ROOT}
        if options.before:
            trees["before"] = stack.enter_context(commit(options.before))
        workers = {name: stack.enter_context(serving(tree)) for name, tree in trees.items()}
        found = measured(workers, options.rounds, max(1, options.jobs // options.rounds))
    for name, kinds in found.items():
        for kind, parts in kinds.items():
            log.info("%s, %s: %.1f ms beside drawing", name, kind, parts["in all"])
    if options.dry:
        print(json.dumps(found, indent=1))
        return
    figures = {"jobs": options.jobs, "before": options.before, "milliseconds": found}
    path = write_result("jobs", figures)
    write_page(json.loads((RESULTS / "jobs.json").read_text()))
    log.info("written to %s", path)


if __name__ == "__main__":
    main()
