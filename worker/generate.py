"""`lora generate --prompt ... --lora PATH[:SCALE] ...`: draws with the worker, into files."""

from __future__ import annotations

import base64
import os
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lora.commands.shared import progress, with_scale, write_file
from lora.errors import LoraNotFound, ToolError
from settings import Settings, SettingsError
from worker.opening import read_settings

if TYPE_CHECKING:
    from lora.tools import OnProgress

Wanted = tuple[str, float]
"""The source and the scale of a LoRA."""

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
    add("--prompt", required=True, help="what to draw")
    add(
        "--lora",
        nargs="+",
        action="extend",
        default=[],
        metavar="LORA[:SCALE]",
        help="a file or PEFT folder, or whatever a job may name; may be repeated",
    )
    add(
        "--config_json",
        "--config-json",
        type=Path,
        metavar="FILE",
        help="LoRAs in LightX2V's form: lora_path and strength_model, or lora_configs",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="where pictures go")
    add("--model", help="as WORKER_MODEL: a repo, a folder, a checkpoint or `demo`")
    add("--steps", type=int, dest="num_inference_steps", help="denoising steps")
    for name, (kind, words) in FIELDS.items():
        add(f"--{name.replace('_', '-')}", type=kind, help=words)


def run(options: Namespace) -> Mapping[str, Any]:
    """Draws, and writes the pictures. Raises: CodedError, if possible before the model is loaded."""
    wanted = _wanted(options)
    if options.out.exists() and not options.out.is_dir():
        raise ToolError(f"{options.out} is no folder")
    settings = replace(
        _settings(),
        **({"model": options.model} if options.model else {}),
        max_answer_mb=1e9,  # no platform has to carry the pictures,
        bucket_endpoint_url="",  # and no bucket is to have them
        lora_preload="",
    )
    with (
        progress() as on_progress,
        _gathered(wanted, settings, on_progress) as (entries, own),
        _folder(options.out),
    ):
        answer = _draw(own, _input(options, entries), on_progress)
    if "error" in answer:
        error = answer["error"]
        for entry, (source, _) in zip(entries, wanted, strict=False):
            error = error.replace(entry["path"], source)
        return {"images": [], "errors": [error]}
    options.out.mkdir(parents=True, exist_ok=True)
    written = [_written(uri, options.out, answer["seed"]) for uri in answer.pop("images")]
    del answer["image_url"]
    for report, (source, _) in zip(answer["loras"], wanted, strict=False):
        report["source"] = source
    return {"images": [str(path) for path in written], **answer}


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Checks before the work that the folder can be made; afterwards it is removed if it was not there."""
    there = path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if not there:
            path.rmdir()


def _wanted(options: Namespace) -> list[Wanted]:
    from lora.volume.presets import read_config

    entries = read_config(options.config_json) if options.config_json else ()
    given = [(entry["path"], entry.get("scale")) for entry in entries]
    given += [with_scale(text) for text in options.lora]
    return [(source, 1.0 if scale is None else scale) for source, scale in given]


def _input(options: Namespace, entries: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("prompt", "num_inference_steps", *FIELDS)
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return {**given, **({"loras": entries} if entries else {})}


def _settings() -> Settings:
    try:
        return read_settings(os.environ)
    except SettingsError as error:
        raise ToolError(str(error), "The README lists the environment variables.") from error


def _draw(settings: Settings, values: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """The answer of a worker in this process. Raises: ToolError if the model cannot be loaded."""
    _quiet()
    from handler import Worker
    from pipelines.weights import WeightsMissing
    from schemas import parse_job

    job = {"id": "generate", "input": values}
    parse_job(job)  # before the model is loaded
    worker = Worker(
        settings, lambda _, now: on_progress(int(100 * now["fraction"]), 100, now["text"])
    )
    try:
        worker.setup()
    except WeightsMissing as error:
        raise ToolError(str(error), "`demo` is the model that is always here.") from error
    return dict(worker(job))


def _quiet() -> None:
    """Silences the libraries' progress bars and advice, which would mix with the errors on stderr."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_transformers, of_diffusers):
        library.set_verbosity_error()
        library.disable_progress_bar()


@contextmanager
def _gathered(
    wanted: list[Wanted], settings: Settings, on_progress: OnProgress
) -> Iterator[tuple[list[dict[str, Any]], Settings]]:
    """The entries of a job that name the LoRAs, and the settings of a worker that finds them.

    A job cannot name a path, by design. So each LoRA, from the user's files or from the cache, is linked into
    a cache for this run, or copied if it cannot be linked. The originals do not change.
    """
    if not wanted:
        yield [], settings
        return
    with TemporaryDirectory(prefix="lora-") as folder:
        root, entries = Path(folder), []
        for index, (source, scale) in enumerate(wanted):
            place = root / f"{index}"
            place.mkdir()
            name = _local(source, place) or _fetched(source, settings, place, on_progress)
            entries.append({"path": f"{index}/{name}", "scale": scale})
        own = replace(settings, lora_cache_dir=root, lora_config="", lora_default_preset="")
        yield entries, own


def _local(source: str, place: Path) -> str | None:
    """Puts the user's file or folder into `place`. Returns its name there, or None if there is none."""
    from lora.formats.endings import EXTENSIONS
    from lora.formats.opening import file_of

    path = Path(source).expanduser()
    if path.is_dir():
        path = file_of(path)
    if not path.is_file():
        if source.startswith(("/", "./", "../", "~")):
            raise LoraNotFound(f"there is no file {source}")
        return None
    if path.suffix not in EXTENSIONS:
        raise ToolError(f"{path} is no adapter file", f"Its name ends in {', '.join(EXTENSIONS)}.")
    return _put(path, place)


def _put(path: Path, place: Path) -> str:
    """Links an adapter's file into `place`, with PEFT's config if there is one. Returns its name."""
    from lora.formats.peft import PEFT_CONFIG, PEFT_STEM

    _link(path, place / path.name)
    if path.stem == PEFT_STEM and (config := path.with_name(PEFT_CONFIG)).is_file():
        shutil.copyfile(config, place / PEFT_CONFIG)
    return path.name


def _fetched(source: str, settings: Settings, place: Path, on_progress: OnProgress) -> str:
    """Fetches a source into the user's cache, and from there into `place`. Returns its name there."""
    from lora.fetch.sources import Reference
    from lora.formats.endings import SAFETENSORS
    from lora.formats.peft import PEFT_CONFIG, PEFT_STEM
    from worker.opening import open_cache

    cache, reference = open_cache(settings), Reference(source)
    entry = cache.get(
        cache.resolve(reference), lambda done, total: on_progress(done, total or 0, reference.shown)
    )
    if entry.record.config is None:
        return _put(entry.path, place)
    _link(entry.path, place / f"{PEFT_STEM}{SAFETENSORS}")
    (place / PEFT_CONFIG).write_text(entry.record.config)
    return f"{PEFT_STEM}{SAFETENSORS}"


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


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
