"""The hub's real client against a loopback hub, in processes of their own, as an image build runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.adapters import as_bytes, kohya
from tests.conftest import ROOT
from tests.server import LoopbackServer

ADAPTER = as_bytes(kohya())


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "download_weights.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def environment(tmp_path: Path, server: LoopbackServer) -> dict[str, str]:
    own = {
        "HF_ENDPOINT": server.address,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "hf_canary",
        "LORA_ALLOW_PRIVATE_URLS": "1",
        "LORA_CACHE_DIR": str(tmp_path / "loras"),
        "WORKER_MODEL": "someone/sdxl-tune",
    }
    return {**os.environ, **own}


def test_bake_then_check_without_the_network(
    environment: dict[str, str], server: LoopbackServer
) -> None:
    files = {
        "model_index.json": b'{"unet": ["diffusers", "UNet2DConditionModel"]}',
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.fp16.safetensors": ADAPTER,
        "unet/diffusion_pytorch_model.safetensors": ADAPTER,
        "whole.safetensors": ADAPTER,
    }
    server.serve_repo("someone/sdxl-tune", files)
    missing = run(environment, "--check")
    assert missing.returncode == 2
    assert "someone/sdxl-tune is neither" in missing.stderr
    baked = run(environment)
    assert baked.returncode == 0, baked.stderr
    server.replies.clear()
    checked = run(environment, "--check")
    assert checked.returncode == 0, checked.stderr
    assert "someone/sdxl-tune is whole" in checked.stderr
    kept = {
        p.name
        for p in Path(environment["HF_HOME"]).rglob("*")
        if "snapshots" in p.parts and p.is_file()
    }
    assert kept == {"model_index.json", "config.json", "diffusion_pytorch_model.fp16.safetensors"}


def test_loras_are_fetched_into_the_cache(
    environment: dict[str, str], server: LoopbackServer
) -> None:
    server.serve_repo("user/style", {"pytorch_lora_weights.safetensors": ADAPTER})
    url = server.serve("/x/my.safetensors", ADAPTER)
    done = run(environment, "--lora", "user/style", url + "?token=canary")
    assert done.returncode == 0, done.stderr
    cache = Path(environment["LORA_CACHE_DIR"])
    assert sorted(p.name.split("-")[0] for p in cache.glob("*.safetensors")) == [
        "my",
        "pytorch_lora_weights",
    ]
    assert "canary" not in done.stdout + done.stderr


def test_a_lora_that_does_not_exist_is_one_sentence_and_exit_code_2(
    environment: dict[str, str], server: LoopbackServer
) -> None:
    done = run(environment, "--lora", "user/gone")
    assert done.returncode == 2
    assert done.stderr.strip().startswith("LORA_NOT_FOUND: there is no repo user/gone on the hub")


def test_the_public_functions_agree_on_the_path(
    server: LoopbackServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from download_weights import download_lora, get_lora_cache_path

    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("LORA_ALLOW_PRIVATE_URLS", "1")
    server.serve_repo("user/style", {"pytorch_lora_weights.safetensors": ADAPTER})
    for source in (server.serve("/a.safetensors", ADAPTER), "user/style"):
        before = get_lora_cache_path(source)
        assert not before.exists()
        assert download_lora(source) == before
        assert before.read_bytes() == ADAPTER
        assert get_lora_cache_path(before.stem) == before


def test_loras_are_fetched_without_torch(environment: dict[str, str]) -> None:
    code = "import sys; sys.modules['torch'] = None; import download_weights, worker.opening"
    command = [sys.executable, "-c", f"{code}; download_weights.get_lora_cache_path('name')"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert "LoraNotFound" in done.stderr.splitlines()[-1]
