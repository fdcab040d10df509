"""A vLLM server: what it serves, and which adapters it has. Its OpenAI API is asked elsewhere."""

from __future__ import annotations

import json
import subprocess
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests

from lora.errors import CodedError

PATIENCE = 60.0
"""Seconds for one answer of the server about its adapters."""

RUNTIME = "Start it with --enable-lora and the environment variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=True."


class EngineFailed(CodedError):
    """The vLLM server does not answer, or refuses what it should do."""

    code = "ENGINE_FAILED"


class Vllm:
    """A server under a URL. Any thread may use it."""

    def __init__(self, url: str, most: int, key: str = "") -> None:
        """`most`: how many adapters it has at once, unless more are in use; `key`: its API key."""
        self.url = url.rstrip("/")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._most = most
        self._guard, self._counting = threading.Lock(), threading.Lock()
        self._loaded: OrderedDict[str, None] = OrderedDict()
        self._used: Counter[str] = Counter()

    def base(self, *wanted: str) -> str:
        """What the server calls its base, which must have one of these names. Raises: EngineFailed."""
        listed = self._ask("GET", "/v1/models").get("data", [])
        bases = [one for one in listed if not one.get("parent")]
        for one in bases:
            if {_short(one.get("id")), _short(one.get("root"))} & {_short(name) for name in wanted}:
                return str(one["id"])
        there = ", ".join(str(one.get("id")) for one in bases) or "nothing"
        raise EngineFailed(
            f"the vLLM server serves {there}, and not {wanted[0]}", "Check MODEL_NAME."
        )

    def hold(self, name: str) -> None:
        """From now on this adapter is used, and stays where it is; `release` ends that."""
        with self._counting:
            self._used[name] += 1

    def release(self, name: str) -> None:
        """Ends one `hold`."""
        with self._counting:
            self._used[name] -= 1

    def load(self, name: str, folder: Path, *, again: bool = False) -> None:
        """Gives the server an adapter that it does not have; those used longest ago make room.

        `again`: it has forgotten it, as after a restart. Raises: EngineFailed.
        """
        with self._guard:
            if again:
                self._loaded.pop(name, None)
            if name in self._loaded:
                self._loaded.move_to_end(name)
                return
            self._make_room()
            try:
                self._ask("POST", "/v1/load_lora_adapter", lora_name=name, lora_path=str(folder))
            except EngineFailed:
                if name not in self._names():  # it had it already, from a worker before this one
                    raise
            self._loaded[name] = None

    def _make_room(self) -> None:
        idle = [name for name in self._loaded if not self._used[name]]
        for name in idle[: max(0, len(self._loaded) + 1 - self._most)]:
            with suppress(EngineFailed):  # it may have forgotten it
                self._ask("POST", "/v1/unload_lora_adapter", lora_name=name)
            del self._loaded[name]

    def _names(self) -> list[str]:
        with suppress(EngineFailed):
            return [str(one.get("id")) for one in self._ask("GET", "/v1/models").get("data", [])]
        return []

    def metrics(self) -> str:
        """The server's own statistics, as Prometheus reads them. Raises: EngineFailed."""
        return str(self._ask("GET", "/metrics")["text"])

    def _ask(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        """The answer's fields, or `text`. Raises: EngineFailed with what the server says."""
        try:
            answer = requests.request(
                method, self.url + path, json=body or None, headers=self.headers, timeout=PATIENCE
            )
        except requests.RequestException as error:
            raise unreachable() from error
        if answer.status_code == 404 and "lora_adapter" in path and "not exist" not in answer.text:
            raise EngineFailed("the vLLM server loads no adapters while it runs", RUNTIME)
        if answer.status_code >= 400:
            raise EngineFailed(f"the vLLM server refuses {path}: {said_in(answer.text)}")
        with suppress(ValueError):
            if isinstance(fields := answer.json(), dict):
                return fields
        return {"text": answer.text}


def _short(name: object) -> str:
    """The last part of a repo's name or of a folder's path."""
    return str(name).rstrip("/").rsplit("/", 1)[-1]


def unreachable() -> EngineFailed:
    """The error for a server that does not answer."""
    return EngineFailed(
        "the vLLM server does not answer", "Send the request again; its log has more."
    )


def said_in(text: str) -> str:
    """The sentence in an error of the server's."""
    with suppress(ValueError):
        fields = json.loads(text)
        error = fields.get("error", fields) if isinstance(fields, dict) else {}
        if isinstance(error, dict) and error.get("message"):
            return str(error["message"])[:500]
    return " ".join(text.split())[:500] or "no reason given"


def start(
    command: Sequence[str], environ: dict[str, str], url: str, wait: Callable[[], None]
) -> Any:
    """Starts a server and waits until it is ready; the process. `wait` is called between two looks.

    Raises: EngineFailed if it ends, or is not there; what `wait` raises. Then no process is left.
    """
    try:
        process = subprocess.Popen(list(command), env=environ)
    except OSError as error:
        raise EngineFailed(
            "there is no vllm here to start", "Use the image of Dockerfile.vllm."
        ) from error
    try:
        while process.poll() is None:
            with suppress(requests.RequestException):
                if requests.get(f"{url}/health", timeout=5).status_code == 200:
                    return process
            wait()
    except BaseException:
        end(process)
        raise
    raise EngineFailed(
        f"vllm ended with {process.returncode} as it started", "Its log has the reason."
    )


def end(process: Any) -> None:
    """Ends a server that `start` has started."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
