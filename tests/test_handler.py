"""The handler as a whole, on the demo model: its answers, its errors, and what it leaves behind."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image

import handler
from handler import PHASES, Worker
from lora.engine.engine import EngineBusy, RestoreFailed
from lora.errors import CodedError
from lora.volume.loader import LoraLibrary
from settings import Settings
from tests.adapters import as_bytes, kohya, sd15
from tests.conftest import ROOT
from tests.lora.engine.test_engine import State
from tests.server import LoopbackServer
from tests.waiting import PATIENCE, until
from worker.opening import open_cache

FAST: dict[str, Any] = {"prompt": "a big red circle on a blue background", "num_inference_steps": 2}
FAST |= {"seed": 7, "scheduler": "K_EULER"}
SECRET_TEXT = "https://host/x?token=canary"
SECRETS = ("canary", "Traceback")


def job(**values: Any) -> dict[str, Any]:
    return {"id": "test", "input": {**FAST, **values}}


def picture(answer: dict[str, Any], index: int = 0) -> Image.Image:
    assert "error" not in answer, answer
    data = answer["images"][index].split(",", 1)[1]
    return Image.open(io.BytesIO(base64.b64decode(data)))


def pixels(answer: dict[str, Any], index: int = 0) -> np.ndarray[Any, Any]:
    return np.asarray(picture(answer, index))


@contextmanager
def pipeline_unchanged(worker: Worker) -> Iterator[None]:
    pipeline = worker.parts.pipeline
    networks = [*pipeline.components.values(), pipeline._base.vae]
    before = [State(network) for network in networks]
    yield
    for state, network in zip(before, networks, strict=True):
        state.assert_same(network)


def data_uri(size: int = 64) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (200, 30, 40)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# --- answers -------------------------------------------------------------------------------------


def test_a_plain_request_is_answered_in_worker_sdxls_shape(demo_worker: Worker) -> None:
    answer = demo_worker(job())
    assert answer["image_url"] == answer["images"][0]
    assert answer["image_url"].startswith("data:image/png;base64,")
    assert answer["seed"] == 7
    assert answer["model"] == "demo"
    assert (answer["loras"], answer["warnings"]) == ([], [])
    assert tuple(answer["timings"]) == PHASES
    assert picture(answer).size == (64, 64)
    json.dumps(answer, allow_nan=False)


def test_a_lora_is_reported_and_changes_the_picture_and_nothing_else(demo_worker: Worker) -> None:
    plain = pixels(demo_worker(job()))
    with pipeline_unchanged(demo_worker):
        answer = demo_worker(job(loras=[{"path": "demo-night", "scale": 0.9}]))
    assert not np.array_equal(pixels(answer), plain)
    report = answer["loras"][0]
    assert report["source"] == "demo-night"
    assert report["file"] == "demo-night.safetensors"
    assert (report["algorithm"], report["origin"], report["status"]) == (
        "loha",
        "cached",
        "applied",
    )
    assert (report["scale"], report["unused_keys"]) == (0.9, [])
    assert report["layers"] > 50
    assert len(report["sha256"]) == 64
    for phase in ("apply", "restore", "denoise", "decode", "encode_prompt"):
        assert answer["timings"][phase] > 0
    np.testing.assert_array_equal(pixels(demo_worker(job())), plain)


def test_every_demo_adapter_applies_wholly(demo_worker: Worker) -> None:
    kinds = {"stripes": "lora", "outline": "lora", "night": "loha", "spiral": "lora"}
    with pipeline_unchanged(demo_worker):
        answer = demo_worker(job(loras=[f"demo-{name}" for name in kinds]))
    assert [r["algorithm"] for r in answer["loras"]] == list(kinds.values())
    assert all(r["unused_keys"] == [] for r in answer["loras"])
    assert answer["warnings"] == []


def test_a_lora_is_downloaded_once_and_then_cached(
    demo_worker: Worker, server: LoopbackServer
) -> None:
    url = server.serve("/my.safetensors", as_bytes(kohya())) + "?token=canary"
    first, second = demo_worker(job(loras=[url])), demo_worker(job(loras=[url]))
    assert [a["loras"][0]["origin"] for a in (first, second)] == ["downloaded", "cached"]
    assert server.hits["/my.safetensors"] == 1
    assert "canary" not in json.dumps(first)
    np.testing.assert_array_equal(pixels(first), pixels(second))


def test_unused_tensors_are_listed_and_warned_of(
    demo_worker: Worker, server: LoopbackServer
) -> None:
    tensors = kohya() | {"lora_unet_no_such_layer.alpha": torch.tensor(1.0)}
    answer = demo_worker(job(loras=[server.serve("/odd.safetensors", as_bytes(tensors))]))
    report = answer["loras"][0]
    assert [unused["key"] for unused in report["unused_keys"]] == ["lora_unet_no_such_layer.alpha"]
    assert report["used_keys"] + len(report["unused_keys"]) == len(tensors)
    assert "1 of 10 tensors were not used" in answer["warnings"][0]


def test_strict_loras_refuse_a_tensor_that_cannot_be_used(
    demo_worker: Worker, server: LoopbackServer
) -> None:
    url = server.serve(
        "/odd.safetensors", as_bytes(kohya() | {"lora_unet_no_such_layer.alpha": torch.tensor(1.0)})
    )
    error = demo_worker(job(loras=[url], strict_loras=True))["error"]
    assert error.startswith("LORA_UNSUPPORTED: ")
    assert "1 of 10 tensors cannot be used (lora_unet_no_such_layer.alpha: no module" in error


def test_several_pictures_differ_and_a_seed_gives_them_again(demo_worker: Worker) -> None:
    first, second = (demo_worker(job(num_images=3)) for _ in range(2))
    assert len(first["images"]) == 3
    assert not np.array_equal(pixels(first, 0), pixels(first, 1))
    assert first["images"] == second["images"]


@pytest.mark.parametrize(("name", "kind"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_output_formats(demo_worker: Worker, name: str, kind: str) -> None:
    answer = demo_worker(job(output_format=name, output_quality=80))
    assert picture(answer).format == kind
    assert answer["image_url"].startswith(f"data:image/{name};base64,")


def test_a_png_carries_its_parameters_as_web_uis_read_them(demo_worker: Worker) -> None:
    answer = demo_worker(job(loras=[{"path": "demo-night", "scale": 0.5}], negative_prompt="red"))
    lines = picture(answer).text["parameters"].splitlines()  # type: ignore[attr-defined]
    assert lines[0] == f"{FAST['prompt']} <lora:demo-night:0.5>"
    assert lines[1] == "Negative prompt: red"
    start = "Steps: 2, Sampler: K_EULER, CFG scale: 7.5, Seed: 7, Size: 64x64, Model: demo, "
    sha256 = answer["loras"][0]["sha256"]
    assert lines[2] == start + f'Lora hashes: "demo-night: {sha256[:12]}"'


def test_entries_that_name_no_lora_are_skipped_with_a_warning(demo_worker: Worker) -> None:
    answer = demo_worker(job(loras=[5]))
    assert "loras[0]" in answer["warnings"][0]
    np.testing.assert_array_equal(pixels(answer), pixels(demo_worker(job())))


def test_image_to_image_with_loras_uses_the_base(demo_worker: Worker) -> None:
    with pipeline_unchanged(demo_worker):
        answer = demo_worker(job(image_url=data_uri(), strength=0.9, loras=["demo-night"]))
    assert picture(answer).size == (64, 64)
    assert "refresh_worker" not in answer


PUBLISHED = {
    ".runpod/tests.json": {
        "prompt": "a majestic steampunk dragon soaring through a cloudy sky, intricate clockwork "
        "details, golden hour lighting, highly detailed",
        "negative_prompt": "blurry, very low quality, deformed, ugly, text, watermark, signature,",
        "seed": 1337,
    },
    "test_input.json": {
        "prompt": "A majestic steampunk dragon soaring through a cloudy sky, intricate clockwork "
        "details, golden hour lighting, highly detailed",
        "negative_prompt": "blurry, low quality, deformed, ugly, text, watermark, signature",
        "seed": 42,
    },
}  # fmt: skip


@pytest.mark.parametrize("values", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_worker_sdxls_published_inputs_run_unchanged(
    demo_worker: Worker, values: dict[str, Any]
) -> None:
    shared = {
        "height": 1024, "width": 1024, "num_inference_steps": 1, "refiner_inference_steps": 4,
        "guidance_scale": 7.5, "strength": 0.3, "high_noise_frac": 0.8, "scheduler": "K_EULER",
        "num_images": 1, "image_url": None,
    }  # fmt: skip
    answer = demo_worker({"id": "published", "input": {**shared, **values}})
    assert picture(answer).size == (1024, 1024)
    assert answer["seed"] == values["seed"]


@pytest.mark.parametrize(
    ("error", "code", "refresh"),
    [
        (torch.OutOfMemoryError("canary"), "OUT_OF_MEMORY", True),
        (RestoreFailed("1 weights"), "INTERNAL", True),
        (torch.AcceleratorError("canary"), "INTERNAL", True),
        (EngineBusy("canary"), "INTERNAL", True),
        (KeyError("canary"), "INTERNAL", False),
    ],
)
def test_the_worker_asks_to_be_replaced_only_where_it_must_not_go_on(
    demo_worker: Worker, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, refresh: bool
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(demo_worker.parts.pipeline, "generate", fail)
    answer = demo_worker(job())
    assert answer["error"].startswith(f"{code}: ")
    assert answer.get("refresh_worker", False) is refresh
    assert "canary" not in answer["error"]


def test_a_scale_of_zero_is_reported_as_what_it_is(demo_worker: Worker) -> None:
    answer = demo_worker(job(loras=[{"path": "demo-night", "scale": 0}]))
    assert (answer["loras"][0]["layers"], answer["loras"][0]["status"]) == (0, "scale is 0")
    np.testing.assert_array_equal(pixels(answer), pixels(demo_worker(job())))


def test_a_range_without_a_step_is_reported_as_what_it_is(demo_worker: Worker) -> None:
    entry = {"path": "demo-night", "start": 0.9, "end": 0.95}
    report = demo_worker(job(loras=[entry]))["loras"][0]
    assert (report["layers"], report["status"]) == (0, "no step in its range")


# --- errors --------------------------------------------------------------------------------------

Prepare = Callable[[LoopbackServer], Any]

BAD_JOBS: dict[str, tuple[Prepare, str, str]] = {
    "not an object": (lambda s: "text", "INVALID_INPUT", "the job is not an object"),
    "no prompt": (lambda s: {"input": {}}, "INVALID_INPUT", "prompt is required"),
    "unknown field": (lambda s: job(promt="x"), "INVALID_INPUT", "promt is not a field"),
    "all at once": (lambda s: job(width=1023, num_images=0), "INVALID_INPUT", "2 faults"),
    "width 1023": (lambda s: job(width=1023), "INVALID_INPUT", "not a multiple of 8"),
    "num_images 0": (lambda s: job(num_images=0), "INVALID_INPUT", "less than 1"),
    "num_images 100": (lambda s: job(num_images=100), "INVALID_INPUT", "more than 4"),
    "unknown scheduler": (lambda s: job(scheduler="x"), "INVALID_INPUT", "K_EULER_ANCESTRAL"),
    "scale big": (
        lambda s: job(loras=[{"path": "demo-night", "scale": "big"}]),
        "INVALID_INPUT",
        "loras[0].scale",
    ),
    "404": (
        lambda s: job(loras=["demo-night", s.url("/no.safetensors?token=canary")]),
        "LORA_NOT_FOUND",
        "/no.safetensors",
    ),
    "html": (
        lambda s: job(loras=[s.serve("/login.safetensors", b"<!DOCTYPE html><html>canary")]),
        "LORA_CORRUPT",
        "web page",
    ),
    "truncated": (
        lambda s: job(loras=[s.serve("/cut.safetensors", as_bytes(kohya())[:-50])]),
        "LORA_CORRUPT",
        "50 bytes are missing",
    ),
    "no such name": (
        lambda s: job(loras=["demo-nigth"]),
        "LORA_NOT_FOUND",
        "Did you mean demo-night",
    ),
    "out of the cache": (
        lambda s: job(loras=["../../etc/passwd"]),
        "LORA_SOURCE_INVALID",
        "leads out of the LoRA cache",
    ),
    "SD 1.5": (
        lambda s: job(loras=[s.serve("/sd15.safetensors", as_bytes(sd15()))]),
        "LORA_INCOMPATIBLE",
        "made for SD 1.5",
    ),
    "wrong hash": (
        lambda s: job(loras=[{"path": "demo-night", "sha256": "0" * 64}]),
        "LORA_CORRUPT",
        "has the sha256",
    ),
    "no picture": (
        lambda s: job(image_url="data:image/png;base64,AAAA", strength=1),
        "INVALID_INPUT",
        "not a whole picture",
    ),
    "no steps left": (
        lambda s: job(image_url=data_uri(), strength=0.1),
        "INVALID_INPUT",
        "less than one",
    ),
}


@pytest.mark.parametrize(("prepare", "code", "said"), BAD_JOBS.values(), ids=BAD_JOBS.keys())
def test_a_bad_job_gets_its_sentence_and_leaves_the_worker_serving(
    demo_worker: Worker,
    server: LoopbackServer,
    prepare: Prepare,
    code: str,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad = prepare(server)
    with pipeline_unchanged(demo_worker):
        answer = demo_worker(bad)
    assert set(answer) == {"error"}
    assert answer["error"].startswith(f"{code}: ")
    assert said in answer["error"]
    assert not any(secret in answer["error"] + caplog.text for secret in SECRETS)
    assert "images" in demo_worker(job(num_inference_steps=1))


@pytest.mark.parametrize("where", ["resolve", "apply", "generate", "encode"])
def test_a_failure_anywhere_is_answered_and_leaves_no_trace(
    demo_worker: Worker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    plain = pixels(demo_worker(job()))
    targets = {
        "resolve": "lora.volume.cache.VolumeCache.resolve",
        "apply": "lora.engine.prepared.make_factors",
        "generate": "diffusers.AutoencoderKL.decode",
        "encode": "worker.image_job.encode",
    }

    def broken(*_: object, **__: object) -> object:
        raise RuntimeError(SECRET_TEXT)

    with monkeypatch.context() as patch, pipeline_unchanged(demo_worker):
        patch.setattr(targets[where], broken)
        answer = demo_worker(job(loras=["demo-stripes"]))
    assert set(answer) == {"error"}
    assert answer["error"].startswith("INTERNAL: ")
    assert "canary" not in answer["error"] + caplog.text
    np.testing.assert_array_equal(pixels(demo_worker(job())), plain)


def test_merged_mode_draws_nearly_the_same_and_restores(demo_worker: Worker) -> None:
    from dataclasses import replace

    merged = Worker(replace(demo_worker.settings, lora_mode="merged")).setup()
    merged(job())  # transformers notes things on its modules when they first run
    asked = job(loras=["demo-stripes", {"path": "demo-night", "scale": 0.5}])
    with pipeline_unchanged(merged):
        ours = pixels(merged(asked)).astype(int)
    theirs = pixels(demo_worker(asked)).astype(int)
    assert np.abs(ours - theirs).max() <= 2


def test_the_requests_mode_goes_before_the_workers_and_is_reported(demo_worker: Worker) -> None:
    for asked, expected in (("merged", "merged"), ("dynamic", "dynamic"), (None, "dynamic")):
        answer = demo_worker(job(loras=["demo-stripes"], lora_mode=asked))
        assert answer["loras"][0]["mode"] == expected  # auto: two steps do not pay for merging
    answer = demo_worker(job(loras=["demo-stripes"], num_inference_steps=8))
    assert answer["loras"][0]["mode"] == "merged"
    json.dumps(answer)


def test_scales_by_component_and_block_say_how_many_layers_change(demo_worker: Worker) -> None:
    def layers(**entry: Any) -> int:
        answer = demo_worker(job(loras=[{"path": "demo-spiral", **entry}]))
        return int(answer["loras"][0]["layers"])

    whole, text = layers(), layers(scale={"unet": 0})
    assert 0 < text < whole
    assert layers(scale={"text_encoder": 0, "text_encoder_2": 0}) == whole - text
    middle = layers(scale={"text_encoder": 0, "text_encoder_2": 0}, blocks={"IN": 0, "OUT": 0})
    assert 0 < middle < whole - text
    assert layers(blocks="0" + ",0" * 19) == 0


def test_a_range_of_the_denoising_lies_between_none_and_all_of_it(demo_worker: Worker) -> None:
    def draw(*loras: Any) -> np.ndarray[Any, Any]:
        with pipeline_unchanged(demo_worker):
            return pixels(demo_worker(job(num_inference_steps=4, loras=list(loras)))).astype(int)

    plain, whole = draw(), draw("demo-stripes")
    ranged = draw({"path": "demo-stripes", "start": 0.5})
    assert (ranged != plain).any()
    assert (ranged != whole).any()
    np.testing.assert_array_equal(draw({"path": "demo-stripes", "start": 0.9}), plain)


def test_a_word_of_a_file_is_there_for_one_job(demo_worker: Worker, server: LoopbackServer) -> None:
    encoders = demo_worker.parts.pipeline.components
    tensors = {
        f"bundle_emb.<thing>.{name}": torch.randn(2, encoders[component].config.hidden_size)
        for name, component in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2"))
    }
    url = server.serve("/words.safetensors", as_bytes(tensors))
    prompt = "a big red <thing> on a blue background"
    plain = pixels(demo_worker(job(prompt=prompt)))
    with pipeline_unchanged(demo_worker):
        answer = demo_worker(job(prompt=prompt, loras=[url]))
    assert (answer["loras"][0]["words"], answer["loras"][0]["status"]) == (["<thing>"], "applied")
    assert (pixels(answer) != plain).any()
    np.testing.assert_array_equal(pixels(demo_worker(job(prompt=prompt))), plain)
    unsaid = pixels(demo_worker(job(loras=[url])))
    np.testing.assert_array_equal(unsaid, pixels(demo_worker(job())))


def test_an_answer_over_the_limit_is_refused(demo_worker: Worker) -> None:
    from dataclasses import replace

    small = Worker(replace(demo_worker.settings, max_answer_mb=0.005)).setup()
    answer = small(job())
    assert answer["error"].startswith("OUTPUT_TOO_LARGE: ")


# --- as a program --------------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    import os

    own = {"WORKER_MODEL": "demo", "LORA_CACHE_DIR": str(tmp_path / "loras"), "HOME": str(tmp_path)}
    return {**os.environ, **own, "RUNPOD_DEBUG_LEVEL": "INFO"}


def test_importing_the_handler_loads_nothing_and_starts_nothing() -> None:
    code = "import handler, sys; print('runpod' in sys.modules, handler.default_worker.cache_info().currsize)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "0"]


@pytest.mark.parametrize(
    ("own", "parts"),
    [
        (
            {"WORKER_MODEL": "nobody/nothing"},
            ("nobody/nothing", "14 GB", "python download_weights.py", "WORKER_MODEL=demo"),
        ),
        (
            {"LORA_MODE": "fast", "WORKER_MODLE": "x"},
            ("LORA_MODE", "(did you mean WORKER_MODEL?)"),
        ),
    ],
)
def test_a_worker_that_cannot_start_says_why_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, own: dict[str, str], parts: tuple[str, ...]
) -> None:
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("handler.set_up", lambda **_: None)
    handler.default_worker.cache_clear()
    with pytest.raises(SystemExit) as caught:
        handler.main()
    text = caught.value.code  # which Python prints to stderr, to exit with 1
    assert isinstance(text, str)
    assert text.startswith("the worker cannot start: ")
    assert "\n" not in text
    assert all(part in text for part in parts)


@pytest.mark.slow
def test_test_input_runs_one_job_through_the_sdk(environment: dict[str, str]) -> None:
    own = {"loras": ["demo-stripes.safetensors"]}  # which the empty cache does not hold
    command = [
        sys.executable,
        "handler.py",
        "--test_input",
        json.dumps(job(output_format="jpeg", **own)),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "data:image/jpeg;base64," in done.stdout
    command[-1] = json.dumps({"input": {"promt": "x"}})
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "INVALID_INPUT: 2 faults" in done.stdout + done.stderr


@pytest.mark.slow
def test_rp_serve_api_answers_jobs(environment: dict[str, str], tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "handler.py", "--rp_serve_api", "--rp_api_port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}/runsync"
        answer = _post_when_ready(url, job(), process)
        assert answer["status"] == "COMPLETED"
        assert answer["output"]["images"][0].startswith("data:image/png;base64,")
        bad = requests.post(
            url, json={"input": {"prompt": "x", "width": 1023}}, timeout=PATIENCE
        ).json()
        assert bad["error"].startswith("INVALID_INPUT: ")
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _post_when_ready(url: str, body: Any, process: subprocess.Popen[bytes]) -> Any:
    def answer() -> Any:
        assert process.poll() is None, "the server ended"
        with suppress(requests.ConnectionError):
            return requests.post(url, json=body, timeout=PATIENCE).json()

    return until(answer, pause=0.3)


def test_several_loras_download_with_one_progress(
    demo_worker: Worker, server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(demo_worker, "_send", lambda job, update: told.append(update["text"]))
    urls = [server.serve(f"/p{n}.safetensors", as_bytes(kohya(seed=n))) for n in (7, 8)]
    answer = demo_worker(job(loras=urls))
    assert [one["origin"] for one in answer["loras"]] == ["downloaded"] * 2
    downloads = [text for text in told if text.startswith("downloading")]
    assert re.fullmatch(r"downloading 2 LoRAs 100%, [\d.e+]+ MB/s", downloads[-1])
    assert told.index(downloads[-1]) < told.index("step 1/2")


def test_a_cache_that_cannot_be_written_is_told_in_every_answer(
    demo_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = demo_worker.parts.library.cache.shelf
    monkeypatch.setattr(shelf, "look_again", lambda: "the volume is gone")
    assert demo_worker(job())["warnings"] == ["the volume is gone"]


def preloading(folder: Path, *sources: str) -> Worker:
    settings = Settings(
        model="demo",
        device="cpu",
        lora_cache_dir=folder,
        lora_preload=", ".join(sources),
        lora_allow_private_urls=True,
    )
    return Worker(settings)


def test_preloaded_loras_are_there_before_the_first_job(
    demo_worker: Worker, tmp_path: Path, server: LoopbackServer
) -> None:
    url, gone = server.serve("/pre.safetensors", as_bytes(kohya())), server.url("/gone?t=canary")
    worker = preloading(tmp_path, url, gone)
    worker.__dict__["parts"] = replace(  # another cache, the same models
        demo_worker.parts,
        library=LoraLibrary(open_cache(worker.settings), demo_worker.parts.engine.key_map),
    )
    worker.setup()
    until(lambda: "under way" not in worker.preloaded.values())
    assert worker.preloaded[url] == "ready"
    assert worker.preloaded[gone.partition("?")[0]].startswith("LORA_NOT_FOUND: ")
    assert "canary" not in str(worker.preloaded)
    worker.check_fitness()
    assert worker(job(loras=[url]))["loras"][0]["origin"] == "cached"
    assert server.hits["/pre.safetensors"] == 1


def test_a_worker_that_preloads_what_can_mean_nothing_is_not_fit(tmp_path: Path) -> None:
    with pytest.raises(CodedError) as caught:
        preloading(tmp_path, "fine", "../x").check_fitness()
    assert str(caught.value).startswith("LORA_SOURCE_INVALID: ")
