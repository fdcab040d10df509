"""`lora generate --prompt ... --lora PATH[:SCALE] ...`: draws with the worker, into files."""

from __future__ import annotations

import base64
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora.commands.shared import bytes_of, progress, with_scale, write_file
from lora.errors import ToolError
from settings import Settings, SettingsError
from worker.opening import open_cache, read_settings

if TYPE_CHECKING:
    from lora.tools import OnProgress

EXAMPLE = (
    "generate --model demo --prompt 'a red circle' --lora demo/loras/demo-stripes.safetensors:0.8 "
    "--out pictures"
)

FIELDS: Mapping[str, tuple[type, str]] = {
    "negative_prompt": (str, "what not to draw"),
    "seed": (int, "same seed, same picture; drawn if it is not given"),
    "width": (int, "pixels"),
    "height": (int, "pixels"),
    "num_images": (int, "how many pictures"),
    "guidance_scale": (float, "how strictly the prompt is followed"),
    "scheduler": (str, "the sampler, as in a job"),
    "lora_mode": (str, "auto, dynamic or merged"),
}
"""Field of a job -> its type and help; defaults and limits are those of the job."""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's options."""
    add = parser.add_argument
    add("--prompt", required=True, metavar="TEXT", help="what to draw")
    add(
        "--lora",
        nargs="+",
        action="extend",
        default=[],
        metavar="LORA[:SCALE]",
        help="a file or a folder that PEFT saved, or whatever a job may name; may be repeated",
    )
    add(
        "--config_json",
        "--config-json",
        type=Path,
        metavar="FILE",
        help="LoRAs in LightX2V's form: lora_path and strength_model, or lora_configs",
    )
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="where the pictures go; none there is overwritten",
    )
    add(
        "--model",
        help="the model: a repo, a folder, a checkpoint or `demo`; by default WORKER_MODEL",
    )
    add("--steps", type=int, dest="num_inference_steps", help="denoising steps")
    for name, (kind, words) in FIELDS.items():
        add(f"--{name.replace('_', '-')}", type=kind, help=words)


def run(options: Namespace) -> Mapping[str, Any]:
    """Draws, and writes the pictures. Raises: CodedError, if possible before the model is loaded."""
    loras = _loras(options)
    if options.out.exists() and not options.out.is_dir():
        raise ToolError(f"{options.out} is no folder")
    own = {"model": options.model} if options.model else {}
    if loras:  # the worker's defaults are for jobs without LoRAs
        own |= {"lora_config": "", "lora_default_preset": ""}
    # No platform carries the pictures, and no bucket gets them.
    settings = replace(
        _settings(), **own, max_answer_mb=1e9, bucket_endpoint_url="", lora_preload=""
    )
    with progress() as on_progress, _folder(options.out):
        answer = _draw(settings, _job(options, loras), on_progress)
    if "error" in answer:
        return {"images": [], "errors": [answer["error"]]}
    options.out.mkdir(parents=True, exist_ok=True)
    written = [_written(uri, options.out, answer["seed"]) for uri in answer.pop("images")]
    del answer["image_url"]
    return {"images": [str(path) for path in written], **answer}


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Checks before the work that the folder can be made; afterwards removes all that this made."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in missing:
            folder.rmdir()


def _loras(options: Namespace) -> list[dict[str, Any]]:
    """The LoRAs of the command line and of the config file, as entries of a job."""
    from lora.volume.presets import read_config

    entries = read_config(options.config_json) if options.config_json else ()
    named = [(entry["path"], entry.get("scale")) for entry in entries]
    named += [with_scale(text) for text in options.lora]
    return [{"path": path, "scale": 1.0 if scale is None else scale} for path, scale in named]


def _job(options: Namespace, loras: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("prompt", "num_inference_steps", *FIELDS)
    values = {name: value for name in names if (value := getattr(options, name)) is not None}
    return {"id": "generate", "input": {**values, **({"loras": loras} if loras else {})}}


def _settings() -> Settings:
    """The worker's settings, from the environment. Raises: ToolError with every fault at once."""
    try:
        return read_settings(os.environ)
    except SettingsError as error:
        raise ToolError(str(error), "docs/settings.md lists the environment variables.") from error


def _draw(settings: Settings, job: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """The answer of a worker in this process. Raises: ToolError if the model cannot be loaded."""
    _quiet()
    from handler import Worker
    from pipelines.weights import WeightsMissing
    from schemas import parse_job
    from worker.own_files import OwnFiles, own_file

    cache = open_cache(settings)
    for use in parse_job(job).loras:  # whatever is wrong with them shows before the model is loaded
        if own_file(use.lora.path) is None:
            cache.get(cache.resolve(use.lora), bytes_of(use.lora.shown, on_progress))
    worker = Worker(
        settings, lambda _, now: on_progress(int(100 * now["fraction"]), 100, now["text"])
    )
    try:
        parts = worker.parts
    except WeightsMissing as error:
        raise ToolError(str(error)) from error
    worker.parts = replace(parts, library=OwnFiles(cache, parts.engine.key_map))
    return dict(worker(job))


def _quiet() -> None:
    """Silences the libraries' progress bars and advice, which would mix with the errors on stderr."""
    from pipelines.lean import import_lean

    import_lean()
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_transformers, of_diffusers):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _written(uri: str, folder: Path, seed: int) -> Path:
    """Writes the picture of a data URI as SEED.png, or SEED-2.png and so on if that exists."""
    head, _, body = uri.partition(",")
    ending = head.partition("/")[2].partition(";")[0]
    path, number = folder / f"{seed}.{ending}", 1
    while path.exists():
        number += 1
        path = folder / f"{seed}-{number}.{ending}"
    write_file(path, base64.b64decode(body))
    return path


def show(result: Mapping[str, Any]) -> str:
    """The files, the LoRAs that were applied, and the warnings."""
    if not result["images"]:
        return ""
    lines = [f"{path}" for path in result["images"]]
    lines.append(f"seed {result['seed']}, model {result['model']}")
    lines += [
        f"{lora['source']}: {lora['algorithm']}, scale {lora['scale']}, {lora['layers']} layers, "
        f"{lora['status']}"
        for lora in result["loras"]
    ]
    seconds = sum(result["timings"].values())
    steps = result["timings"].get("denoise", 0.0)
    lines.append(f"{seconds:.1f} s, {steps:.1f} s of it in the model")
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"])])
