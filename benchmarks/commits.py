"""Do two commits give the same pictures and the same files? `python -m benchmarks.commits BEFORE [AFTER]`.

Each commit is cloned into a temporary folder. There the same jobs go through its handler, and the same
commands through its tools, on the demo model. Answers are compared without their times, files by their bytes.
AFTER is HEAD by default. Prints every difference; the exit code is 1 if there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.clones import ROOT, clone
from benchmarks.report import write_result

STEPS = 4

PROMPT = {
    "prompt": "a big red circle on a blue background",
    "seed": 1,
    "num_inference_steps": STEPS,
}

LORAS: Mapping[str, list[Any]] = {
    "none": [],
    "stripes": ["demo-stripes"],
    "outline": ["demo-outline.safetensors"],
    "night": [{"path": "demo-night", "scale": 0.7}],
    "spiral": [{"path": "demo-spiral", "scale": -0.5}],
    "components": [{"path": "demo-stripes", "scale": {"unet": 0.5, "text_encoder": 0}}],
    "blocks": [{"path": "demo-outline", "blocks": {"IN": 0.5, "MID": 0, "OUT01": 2}}],
    "stack": ["demo-stripes", {"path": "demo-night", "scale": 0.5}, "demo-outline"],
}

OTHERS: Mapping[str, dict[str, Any]] = {
    "range": {"loras": [{"path": "demo-night", "start": 0.25, "end": 0.75}]},
    "k-euler": {"scheduler": "K_EULER", "loras": ["demo-spiral"]},
    "dpm": {"scheduler": "DPM++ 2M SDE Karras", "num_images": 2},
    "lcm": {"scheduler": "LCM", "negative_prompt": "stripes", "guidance_scale": 1},
    "jpeg": {"output_format": "jpeg", "output_quality": 80, "width": 72, "height": 96},
    "no entry": {"loras": [{"scale": 1}, "demo-night"]},
    "strict": {"loras": [{"scale": 1}], "strict_loras": True},
    "faults": {"loras": [{"path": "x", "scale": "much"}], "num_images": 9, "sheduler": "DDIM"},
    "absent": {"loras": ["demo-nigth"]},
    "list": {"action": "loras.list"},
    "library": {"action": "library.list"},
    "presets": {"action": "presets.list"},
}

DRIVER = """
import json, os, sys
from handler import Worker
from settings import Settings

worker = Worker(Settings.from_env(os.environ)).setup()
jobs = json.load(sys.stdin)
json.dump({name: worker({"id": name, "input": job}) for name, job in jobs.items()}, sys.stdout)
"""

STRIPES, NIGHT, OUTLINE = (
    f"demo/loras/demo-{name}.safetensors" for name in ("stripes", "night", "outline")
)
CONVERT = f"convert {STRIPES} --model demo/model --output OUT"

COMMANDS: Mapping[str, str] = {
    "inspect": f"inspect {STRIPES} --against demo/model",
    "inspect night": f"inspect {NIGHT} {OUTLINE}",
    "merge": f"merge --source-model demo/model --lora-model {STRIPES}:0.8 {NIGHT}:0.5 --output OUT/tuned",
    "extract": "extract --source-model demo/model --target-model OUT/tuned --output OUT/learned.safetensors "
    "--rank-energy 0.99 --output-dtype fp16 --verify",
    "extract difference": "extract --source-model demo/model --target-model OUT/tuned "
    "--output OUT/difference.safetensors --diff-only",
    "combine": f"combine {STRIPES}:0.8 {OUTLINE}:0.5 --output OUT/both.safetensors",
    "resize": "resize OUT/both.safetensors --max-bytes 1M --output-dtype fp16 --output OUT/small.safetensors",
    "diffusers": f"{CONVERT}/diffusers.safetensors --naming diffusers",
    "kohya": f"{CONVERT}/kohya.safetensors --naming kohya",
    "original": f"{CONVERT}/original.safetensors --naming original",
    "peft": f"{CONVERT}/peft --naming peft",
    "algorithm": f"convert {NIGHT} --model demo/model --algorithm lora --energy 0.99 "
    "--output OUT/night.safetensors",
    "nothing": "resize OUT/nothing.safetensors --rank 4 --output OUT/x.safetensors",
}

VARYING = ("timings", "seconds")
"""Fields that say how long something took."""

YEAR_2001 = 1e9
"""Numbers above this are points in time, such as when a file was used last."""


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    """The jobs' names and inputs: each list of LoRAs in both modes, then the others."""
    for name, loras in LORAS.items():
        for mode in ("dynamic", "merged"):
            yield f"{name}, {mode}", {**PROMPT, "loras": loras, "lora_mode": mode}
    for name, more in OTHERS.items():
        yield name, more if "action" in more else {**PROMPT, **more}


def results_of(commit: str, folder: Path) -> dict[str, Any]:
    """Name -> answer, what a command printed, or a file's hash, from a clone of the commit in `folder`."""
    tree, out = folder / "tree", folder / "out"
    clone(commit, tree)
    shutil.copytree(tree / "demo" / "loras", out / "loras")
    own = {"WORKER_MODEL": "demo", "WORKER_DEVICE": "cpu", "LORA_CACHE_DIR": str(out / "loras")}
    env = {**os.environ, **own, "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=tree,
        env=env,
        input=json.dumps(dict(jobs())),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    results = {f"job {name}": stable(answer) for name, answer in json.loads(done.stdout).items()}
    for name, line in COMMANDS.items():
        words = line.replace("OUT", str(out)).split()
        ran = subprocess.run(
            [sys.executable, "-m", "lora", *words, "--json"],
            cwd=tree,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        text = (ran.stdout or ran.stderr).replace(str(out), "OUT")
        results[f"command {name}"] = [
            ran.returncode,
            stable(json.loads(text)) if ran.stdout else text,
        ]
    for path in sorted(out.rglob("*")):
        if path.is_file() and "loras" not in path.relative_to(out).parts:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            results[f"file {path.relative_to(out)}"] = digest
    return results


def stable(value: Any) -> Any:
    """An answer without what differs from run to run."""
    if isinstance(value, dict):
        return {name: stable(one) for name, one in value.items() if name not in VARYING}
    if isinstance(value, float) and value > YEAR_2001:
        return "a time"
    return [stable(one) for one in value] if isinstance(value, list) else value


def main() -> int:
    """Compares, prints and keeps the outcome; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?", default="HEAD")
    options = parser.parse_args()
    commits = [
        subprocess.check_output(["git", "rev-parse", name], cwd=ROOT, text=True).strip()
        for name in (options.before, options.after)
    ]
    found = []
    for commit in commits:
        with TemporaryDirectory(prefix="commit-") as folder:
            found.append(results_of(commit, Path(folder)))
    before, after = found
    different = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    for name in different:
        print(f"{name} differs:\n  {str(before.get(name))[:2000]}\n  {str(after.get(name))[:2000]}")
    kinds = {
        kind: sum(name.startswith(kind) for name in before) for kind in ("job", "command", "file")
    }
    print(f"{kinds}: {len(different) or 'none'} differ")
    write_result("commits", {"commits": commits, "compared": kinds, "different": different})
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
