"""What the tests share: a tiny pipeline, a loopback server with faults, and no other network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

import copy
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from demo.networks import new_unet
from handler import Worker
from lora.engine.engine import LoraEngine
from settings import Settings
from tests.server import LoopbackServer

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process draws a long one while the others have ended."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any socket to another machine is refused: a test that needs the network is a wrong test."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests may not connect to {address[0]}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may open a connection, or ask for a host's address."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session", autouse=True)
def own_fallback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where LoRAs go if a cache folder cannot be written: not where other programs' are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora.volume.opening.FALLBACK_ROOT", tmp_path_factory.mktemp("fallback"))
        yield


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    with LoopbackServer() as running:
        yield running


@pytest.fixture(scope="session")
def _unet() -> nn.Module:
    torch.manual_seed(0)
    return new_unet().eval()


@pytest.fixture
def unet(_unet: nn.Module) -> nn.Module:
    """A UNet of SDXL's topology with random weights, this test's own."""
    return copy.deepcopy(_unet)


@pytest.fixture
def engine(unet: nn.Module) -> LoraEngine:
    return LoraEngine({"unet": unet})


@pytest.fixture(scope="session")
def demo_worker(tmp_path_factory: pytest.TempPathFactory, own_fallback: None) -> Worker:
    """The worker on the demo model, its cache in a folder of the test run with the demo's adapters."""
    cache = tmp_path_factory.mktemp("loras")
    for file in (ROOT / "demo" / "loras").glob("*.safetensors"):
        (cache / file.name).write_bytes(file.read_bytes())
    return Worker(
        Settings(model="demo", device="cpu", lora_cache_dir=cache, lora_allow_private_urls=True)
    ).setup()
