"""Stand-ins for what the pages reach, all on this machine: hub, Civitai, a bucket, a web site, RunPod."""

from __future__ import annotations

import contextlib
import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from handler import Worker
from lora.volume.records import DAMAGED, INCOMING
from tests.conftest import ROOT
from tests.emulator.running import Emulator, emulator
from tests.server import LoopbackServer
from tests.test_handler import data_uri
from worker.opening import read_settings

HUB = {
    "nerijs/pixel-art-xl": ("pixel-art-xl.safetensors", "demo-stripes"),
    "ostris/watercolor_style_lora_sdxl": ("watercolor_v1_sdxl.safetensors", "demo-night"),
    "user/style-lora": ("style.safetensors", "demo-outline"),
}
"""The repos that the pages name -> their file, and the demo's adapter that it is here."""
CIVITAI = {12345: (67890, "demo-stripes")}
"""The models that the pages name -> their version, and the demo's adapter that it is here."""
BUCKET = ("https://s3.eu-central-1.amazonaws.com", "pictures")
KEY = "the-key"
ENDPOINT = "local"
DEMO = {"WORKER_MODEL": "demo", "WORKER_DEVICE": "cpu"}


class World:
    """Everything outside of the clone. RunPod, and a worker for JSON requests, start when first asked for.

    RunPod is the emulator with one worker on the demo model; both begin with an empty cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = contextlib.ExitStack()
        self.web = self._open.enter_context(LoopbackServer())
        for repo, (name, adapter) in HUB.items():
            self.web.serve_repo(repo, {name: _demo_adapter(adapter)})
        for model, (version, adapter) in CIVITAI.items():
            self._serve_civitai(model, version, _demo_adapter(adapter))
        for name, colour in (("fox", "red"), ("picture", "red"), ("mask", "white")):
            picture = folder / f"{name}.png"
            Image.new("RGB", (64, 64), colour).save(picture)
            self.web.serve(f"/{name}.png", picture.read_bytes())
        self.web.serve_bucket(BUCKET[1])

    def close(self) -> None:
        self._open.close()

    def environment(self, cache: Path) -> dict[str, str]:
        """The variables that lead to the stand-ins."""
        return {
            "HF_ENDPOINT": self.web.address,
            "CIVITAI_ENDPOINT": self.web.address,
            "LORA_ALLOW_PRIVATE_URLS": "1",
            "LORA_CACHE_DIR": str(cache),
            "RUNPOD_API_KEY": KEY,
            "ENDPOINT_ID": ENDPOINT,
            "OMP_NUM_THREADS": "1",
        }

    def stand_ins(self, text: str) -> dict[str, str]:
        """What a block's text names -> what stands in for it."""
        found = dict.fromkeys(("https://example.com", BUCKET[0]), self.web.address)
        if "https://api.runpod.ai" in text:
            found["https://api.runpod.ai"] = self.runpod.address
        return {name: stand_in for name, stand_in in found.items() if name in text}

    @cached_property
    def cache(self) -> Path:
        """The folder of the worker for JSON requests."""
        return self.folder / "worker-cache"

    @cached_property
    def worker(self) -> Worker:
        return Worker(read_settings({**self.environment(self.cache), **DEMO})).setup()

    @cached_property
    def runpod(self) -> Emulator:
        folder = self.folder / "runpod"
        folder.mkdir()
        environment = {**self.environment(folder / "cache"), **DEMO}
        running = emulator(
            folder, "--api-key", KEY, program=("handler.py",), key=KEY, **environment
        )
        return self._open.enter_context(running)

    @cached_property
    def updates(self) -> list[dict[str, Any]]:
        """The progress of a job with previews, as RunPod got it."""
        job = {"prompt": "a red circle", "preview": True, "num_inference_steps": 30}
        job_id = self.runpod.run(job)
        self.runpod.end(job_id)
        return list(self.runpod.story(job_id)["updates"])

    @cached_property
    def kept(self) -> set[str]:
        """The names of what a worker keeps in its cache, with NAME for a download's own."""
        source = next(iter(HUB))
        actions: list[dict[str, Any]] = [
            {"action": "loras.prefetch", "loras": [source]},
            {"action": "presets.set", "name": "one", "loras": [source]},
            {"action": "library.scan"},
        ]
        answers = [self.worker({"id": one["action"], "input": one}) for one in actions]
        name = answers[0]["loras"][0]["file"]
        for action, field, value in (
            ("loras.pin", "pinned", True),
            ("library.note", "text", "mine"),
            ("library.thumbnail", "picture", data_uri()),
        ):
            self.worker({"id": "a", "input": {"action": action, "name": name, field: value}})
        stem = name.removesuffix(".safetensors")
        there = {path.name.replace(stem, "NAME") for path in self.cache.iterdir()}
        return there | {DAMAGED, INCOMING}

    def _serve_civitai(self, model: int, version: int, body: bytes) -> None:
        about = {"id": version, "modelId": model, "baseModel": "SDXL 1.0"}
        file = {
            "id": 1,
            "name": "style.safetensors",
            "type": "Model",
            "sizeKB": len(body) / 1024,
            "metadata": {"format": "SafeTensor"},
            "hashes": {"SHA256": hashlib.sha256(body).hexdigest().upper()},
            "downloadUrl": self.web.serve(f"/api/download/models/{version}", body),
        }
        versions = [{"id": version, "name": "v1"}]
        self.web.serve_json(f"/api/v1/models/{model}", {"id": model, "modelVersions": versions})
        self.web.serve_json(f"/api/v1/model-versions/{version}", {**about, "files": [file]})


def _demo_adapter(name: str) -> bytes:
    return (ROOT / "demo" / "loras" / f"{name}.safetensors").read_bytes()
