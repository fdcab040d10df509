"""The base weights on this machine: where they lie, whether they are whole, and reading them ahead.

The image's layer of base weights copies what this imports: no torch, and of ours little.
The worker imports it before all else, so it imports little.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora.fetch.snapshots import SnapshotMissing, find_snapshot, snapshots
from settings import Settings

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo" / "model"
DEMO_LORAS = DEMO_MODEL.parent / "loras"
WEIGHTS = ".safetensors"

CACHED = Path("/runpod-volume/huggingface-cache/hub")
"""Where RunPod mounts the models that an endpoint names as cached, in the layout of the hub's own cache."""

READERS, PIECE = 4, 8 << 20
"""Threads that read ahead, and bytes that each reads at a time."""


class WeightsMissing(RuntimeError):
    """Weights that the settings name are not on this machine; the text is `sentence`, and what to do."""

    def __init__(self, sentence: str, hint: str = "") -> None:
        super().__init__("; ".join(filter(None, (sentence, hint))))
        self.sentence = sentence


class WeightsIncomplete(RuntimeError):
    """Weights are missing or not whole; the text says which."""


def baked_hub() -> Path:
    """The hub's cache that the image holds, by HF_HUB_CACHE or HF_HOME as huggingface_hub reads them."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(os.path.expandvars(os.environ.get("HF_HUB_CACHE") or f"{home}/hub")).expanduser()


def hubs(settings: Settings) -> tuple[Path, ...]:
    """The folders in which repos are looked for, in this order; each has the layout of the hub's cache."""
    places = {"baked": baked_hub(), "cached": CACHED, "volume": settings.weights_dir}
    wanted = settings.weights
    return (places[wanted],) if wanted in places else tuple(places.values())


def find_weights(
    source: str, places: Sequence[Path], revision: str | None = None, *, whole: bool = True
) -> Path:
    """The folder or file of a source on this machine; asks no network.

    `places`: hub caches, see `hubs`; the first that has the repo whole, at the `revision` if one is named, is
    taken. Without `whole`, the repo's configs suffice. Raises: WeightsMissing; WeightsIncomplete if what is
    there is not whole.
    """
    if source == "demo":
        return DEMO_MODEL
    path, broken = Path(source), list[WeightsIncomplete]()
    if path.exists():
        if whole and path.is_dir():
            check(path)
        return path
    for place in places:
        try:
            if found := _snapshot(place, source, revision):
                if whole:
                    check(found)
                return found
        except WeightsIncomplete as error:
            broken.append(WeightsIncomplete(f"{source} in {place}: {error}"))
    if broken:
        raise broken[0]
    raise WeightsMissing(
        f"{source} is neither a folder or file here nor a repo in {_listed(places)}",
        "fetch the weights with python download_weights.py (about 14 GB for SDXL with refiner and VAE in "
        "half precision), name them as the endpoint's cached model, or set WORKER_MODEL=demo for the "
        "embedded model",
    )


def _listed(places: Sequence[Path]) -> str:
    return ", ".join(map(str, places[:-1])) + (" or " if places[1:] else "") + str(places[-1])


def _snapshot(place: Path, repo: str, revision: str | None) -> Path | None:
    """The commit of a repo that a revision is in a hub's cache, else that of `main`, else the only one there
    is; None if there is none. Raises: WeightsIncomplete if it cannot be told which, or it is gone.
    """
    try:
        found = find_snapshot(place, repo, revision)
    except SnapshotMissing as error:
        raise WeightsIncomplete(str(error)) from error
    if found or revision:
        return found
    others = snapshots(place, repo)
    if len(others) > 1:
        raise WeightsIncomplete(f"refs/main names none of its {len(others)} commits")
    return next(iter(others), None)


def check(folder: Path) -> None:
    """Raises WeightsIncomplete unless every network has its config and whole weights."""
    for network in networks(folder):
        files = weight_files(network)
        if not files:
            raise WeightsIncomplete(f"{network.name} holds no {WEIGHTS} file")
        if network != folder and not (network / "config.json").exists():
            raise WeightsIncomplete(f"{network.name} has no config.json")
        for file in files:
            try:
                with safe_open(file, framework="np"):  # compares the header with the file's length
                    pass
            except (SafetensorError, OSError) as error:
                where = file.relative_to(folder)
                raise WeightsIncomplete(f"{where} is not whole ({error})") from error


def networks(folder: Path) -> list[Path]:
    """The folders of a pipeline's networks, as its `model_index.json` names them; without one, `folder`."""
    index = folder / "model_index.json"
    parts = _table(index) if index.exists() else {}
    return [folder / name for name, kind in parts.items() if _is_network(kind)] or [folder]


def weight_files(network: Path) -> list[Path]:
    """The files that hold a network's weights, also those that its index names and that are not there.

    Of two sets of weights it is the one in half precision, which is what is loaded.
    """
    files = _in_half(sorted(network.rglob(f"*{WEIGHTS}")))
    if not any("-of-" in one.name for one in files):
        return files  # an index would belong to weights that were not fetched
    indexes = _in_half(sorted(network.glob(f"*{WEIGHTS}.index.json")))
    maps = [table for one in indexes if isinstance(table := _table(one).get("weight_map"), dict)]
    return sorted({*files, *(network / str(name) for table in maps for name in table.values())})


def _in_half(files: list[Path]) -> list[Path]:
    return [one for one in files if ".fp16" in one.name] or files


def _table(file: Path) -> dict[str, Any]:
    """What a JSON file holds. Raises: WeightsIncomplete if that is no object."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise WeightsIncomplete(f"{file.name} cannot be read ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise WeightsIncomplete(f"{file.name} is no JSON object")
    return found


def _is_network(kind: Any) -> bool:
    """Whether a part of a pipeline, given as [library, class], has weights."""
    networks = ("Model", "AutoencoderKL", "CLIPTextModelWithProjection")
    return isinstance(kind, list) and str(kind[-1]).endswith(networks)


class Reading:
    """Reads files in threads and drops what it read, so that the system has it when the files are mapped."""

    seconds = 0.0
    """How long it has read, or read in all."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Begins at once, in the order of the files. One that cannot be read is left to who loads it."""
        self._begun = time.perf_counter()
        self._pieces = iter([(file, at) for file in files for at in range(0, _size(file), PIECE)])
        self._threads = [
            threading.Thread(target=self._read, name=f"read ahead {number}", daemon=True)
            for number in range(READERS)
        ]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Returns when all files are read."""
        for thread in self._threads:
            thread.join()

    def _read(self) -> None:
        buffer = bytearray(PIECE)
        for file, start in self._pieces:  # a list's iterator, which threads may share
            with suppress(OSError), file.open("rb", buffering=0) as opened:
                opened.seek(start)
                opened.readinto(buffer)
            self.seconds = time.perf_counter() - self._begun


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def read_ahead(settings: Settings) -> Reading:
    """Begins to read the weights that the settings name, as far as they are here, in the order of loading."""
    files = list[Path]()
    for source in settings.weight_sources:
        with suppress(WeightsMissing, WeightsIncomplete):
            found = find_weights(source, hubs(settings), settings.model_revision)
            parts = networks(found) if found.is_dir() else []
            files += [file for part in parts for file in weight_files(part)] or [found]
    return Reading(files)
