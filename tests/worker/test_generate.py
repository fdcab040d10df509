"""`generate`: the worker's pipeline on the demo model, from the shell."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from handler import Worker
from tests.adapters import as_bytes, kohya
from tests.conftest import ROOT
from tests.lora.commands.running import Ran, run
from tests.server import LoopbackServer

LORAS = ROOT / "demo" / "loras"
STRIPES = LORAS / "demo-stripes.safetensors"
DRAW = ("--model", "demo", "--prompt", "a big red circle", "--steps", 2, "--seed", 7)


@pytest.fixture(autouse=True)
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "volume"))
    monkeypatch.setenv("WORKER_DEVICE", "cpu")
    monkeypatch.setenv("LORA_ALLOW_PRIVATE_URLS", "1")
    return tmp_path / "volume"


def draw(capsys: pytest.CaptureFixture[str], out: Path, *more: object) -> Ran:
    return run(capsys, "generate", *DRAW, "--out", out, *more, "--json")


def pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def of_worker(worker: Worker, loras: list[Mapping[str, Any]]) -> bytes:
    values = {"prompt": "a big red circle", "num_inference_steps": 2, "seed": 7, "loras": loras}
    answer = worker({"id": "test", "input": values})
    return base64.b64decode(answer["images"][0].partition(",")[2])


def test_a_picture_is_the_workers_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, demo_worker: Worker
) -> None:
    out = tmp_path / "out"
    ran = draw(capsys, out, "--lora", f"{STRIPES}:0.8", LORAS / "demo-night.safetensors")
    assert ran.code == 0, ran.err
    assert ran.json["images"] == [str(out / "7.png")]
    assert [(one["source"], one["scale"]) for one in ran.json["loras"]] == [
        (str(STRIPES), 0.8),
        (str(LORAS / "demo-night.safetensors"), 1.0),
    ]
    own = [{"path": "demo-stripes", "scale": 0.8}, {"path": "demo-night", "scale": 1.0}]
    assert pixels((out / "7.png").read_bytes()) == pixels(of_worker(demo_worker, own))


def test_the_users_files_and_cache_stay_as_they_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, volume: Path
) -> None:
    mine = tmp_path / "mine" / "a.safetensors"
    mine.parent.mkdir()
    mine.write_bytes(STRIPES.read_bytes())
    before = mine.stat()
    assert draw(capsys, tmp_path / "out", "--lora", mine).code == 0
    after = mine.stat()
    assert [one.name for one in mine.parent.iterdir()] == ["a.safetensors"]
    assert (before.st_mtime_ns, before.st_nlink) == (after.st_mtime_ns, after.st_nlink)
    assert mine.read_bytes() == STRIPES.read_bytes()
    assert not volume.exists()


def test_a_url_is_fetched_into_the_users_cache(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, volume: Path, server: LoopbackServer
) -> None:
    url = server.serve("/a.safetensors", STRIPES.read_bytes())
    ran = draw(capsys, tmp_path / "out", "--lora", f"{url}:0.5")
    assert ran.code == 0, ran.err
    assert [one["scale"] for one in ran.json["loras"]] == [0.5]
    assert len(list(volume.glob("a-*.safetensors"))) == 1


def test_the_config_file_of_lightx2v_is_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, about in {
        "one": {"lora_path": [str(STRIPES)], "strength_model": 0.7},
        "two": {"lora_configs": [{"path": str(STRIPES), "strength": 0.7}]},
    }.items():
        config = tmp_path / f"{name}.json"
        config.write_text(json.dumps({**about, "infer_steps": 4}))
        ran = draw(capsys, tmp_path / name, "--config_json", config)
        assert ran.code == 0, ran.err
        assert [(one["file"], one["scale"]) for one in ran.json["loras"]] == [
            ("demo-stripes.safetensors", 0.7)
        ]
    assert (tmp_path / "one" / "7.png").read_bytes() == (tmp_path / "two" / "7.png").read_bytes()


def test_a_peft_folder_is_drawn_with_its_config_from_here_and_from_the_cache(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, volume: Path
) -> None:
    model = ROOT / "demo" / "model"
    volume.mkdir()
    line = ("convert", STRIPES, "--naming", "peft", "--model", model)
    assert run(capsys, *line, "--output", tmp_path / "peft").code == 0
    assert run(capsys, *line, "--output", volume / "mine").code == 0
    drawn = []
    for name, lora in (("plain", STRIPES), ("peft", tmp_path / "peft"), ("cached", "mine")):
        ran = draw(capsys, tmp_path / name, "--lora", lora)
        assert ran.code == 0, ran.err
        drawn.append(pixels((tmp_path / name / "7.png").read_bytes()))
    assert drawn[0] == drawn[1] == drawn[2]


def test_the_workers_own_default_is_for_runs_without_loras(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    volume: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    volume.mkdir()
    (volume / "night.safetensors").write_bytes((LORAS / "demo-night.safetensors").read_bytes())
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps({"lora_path": str(volume / "night.safetensors"), "strength_model": 0.5})
    )
    monkeypatch.setenv("LORA_CONFIG", str(config))
    ran = draw(capsys, tmp_path / "out")
    assert ran.code == 0, ran.err
    assert [(one["file"], one["scale"]) for one in ran.json["loras"]] == [
        ("night.safetensors", 0.5)
    ]
    ran = draw(capsys, tmp_path / "out", "--lora", STRIPES)
    assert ran.code == 0, ran.err
    assert [one["source"] for one in ran.json["loras"]] == [str(STRIPES)]


def test_several_pictures_and_a_second_run_take_free_names(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert draw(capsys, out).code == 0
    assert draw(capsys, out).code == 0
    assert (out / "7.png").read_bytes() == (out / "7-2.png").read_bytes()
    assert draw(capsys, out, "--num-images", 2).code == 0
    assert {one.name for one in out.iterdir()} == {f"7{n}.png" for n in ("", "-2", "-3", "-4")}


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (("--width", 3), "INVALID_INPUT"),
        (("--lora", "/nowhere/a.safetensors"), "LORA_NOT_FOUND"),
        (("--lora", "nothing.safetensors"), "LORA_NOT_FOUND"),
        (("--lora", ROOT / "README.md"), "TOOL_ERROR"),
        (("--lora", ROOT / "docs"), "LORA_NOT_FOUND"),
        (("--model", "/nowhere"), "TOOL_ERROR"),
        (("--config_json", "/nowhere.json"), "TOOL_ERROR"),
    ],
)
def test_what_cannot_be_drawn_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, more: tuple[object, ...], code: str
) -> None:
    ran = draw(capsys, tmp_path / "out" / "of" / "it", *more)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"error: {code}: "), ran.err
    assert not (tmp_path / "out").exists()


def test_a_lora_for_another_model_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(as_bytes({key.replace("unet", "nothing"): t for key, t in kohya().items()}))
    ran = draw(capsys, tmp_path / "out", "--lora", path)
    assert ran.code == 2
    assert ran.err.startswith("error: LORA_INCOMPATIBLE: ")
    assert ran.json["images"] == []


def test_generate_has_help_and_takes_json(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run(capsys, "generate", "--help")
    assert ran.code == 0
    assert "Draw pictures" in ran.out
    assert "--json" in ran.out
