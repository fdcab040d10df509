"""A base that a vLLM server serves: what a request asks for is checked here, and handed to the server.

The server gets an adapter as a PEFT folder that we have written from what we read: under the name of its
content, so that the server mixes up no two, and with every scale in its factors.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import torch

from live.turns import Turns
from lora.engine.engine import LoraEngine
from lora.engine.rows import Rows
from text.loading import COMPONENT, DEMO, DEMO_FOLDER, FILES, ModelUnusable, load_shape
from text.published import name_of, publish
from text.vllm import EngineFailed, Vllm, end, said_in, start, unreachable
from text_settings import TextSettings
from validation import InvalidInput
from worker.parts import Parts
from worker.stop import Stop
from worker.text.answers import DONE
from worker.text.base import Face, folder_of, library_of
from worker.text.input import HINT, TextRequest, plain
from worker.text.models import Models, Ready
from worker.text.parameters import CHAT, UNSERVED, WITHOUT_EFFECT

FOLDER = ".published"
"""Where in the cache's folder adapters lie for the server."""

MOST = 64
"""Adapters that the server has at once."""

STARTING = 1800.0
"""Seconds in which a server must be ready: it may fetch its weights first."""

OURS = (
    "model",
    "messages",
    "prompt",
    "seed",
    "stream_options",
    "loras",
    "lora_selection",
    "strict_loras",
)
"""Fields of a request that are not handed on as they are."""

InThread = Callable[[Callable[[], Any]], Awaitable[Any]]


@dataclass(frozen=True)
class _Handed:
    """A request that the server is to be asked."""

    ready: Ready
    body: dict[str, Any]
    extras: dict[str, Any]
    name: str
    """The published adapter's; empty for none."""
    folder: Path


class VllmBase:
    """The server, and what is known of its base model without its weights."""

    def __init__(self, settings: TextSettings) -> None:
        """Finds the server under TEXT_VLLM_URL, or starts one. Raises: ModelUnusable; EngineFailed."""
        self.settings, self.running = settings, 0
        self.source = str(DEMO_FOLDER) if settings.model == DEMO else settings.model
        ours = not settings.vllm_url
        self._folder = folder_of(settings, FILES if ours else ("config.json",), whole=ours)
        shape = load_shape(settings.model, self._folder)
        self.engine = LoraEngine({COMPONENT: shape})
        self.library = library_of(settings, self.engine)
        face: Any = Face(settings.name, torch.device("cpu"))
        self.parts = Parts(face, self.engine, self.library, None, settings, Turns())
        self.misfit = Rows(self.engine).misfit
        self.models = Models(settings, self.library, self.parts, lambda file: None)
        self._process = None
        url = settings.vllm_url
        if ours:
            url, self._process = self._started()
        self.server = Vllm(url, MOST, settings.vllm_key)
        try:
            self.served = self.server.base(self.source, settings.name)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the server if it was started here."""
        if self._process is not None:
            end(self._process)

    @property
    def counts(self) -> dict[str, int]:
        """How many requests the server has."""
        return {"queued": 0, "running": self.running}

    def _started(self) -> tuple[str, Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + STARTING

        def wait() -> None:
            if time.monotonic() > until:
                raise ModelUnusable("vllm was not ready in time", "Its log has the reason.")
            time.sleep(0.2)

        environ = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        return url, start(command_of(self.settings, self._folder, port), environ, url, wait)

    # --- one request ----------------------------------------------------------------------------

    async def written(
        self, request: TextRequest, stop: Stop, in_a_thread: InThread
    ) -> AsyncGenerator[Any]:
        """The server's answer with what ours have besides, in one piece, or in many for a stream.

        Raises: CodedError.
        """
        handed: _Handed = await _by(stop, in_a_thread(lambda: self._prepared(request, stop)))
        self.running += 1
        self.server.hold(handed.name)
        try:
            if handed.name:
                await _by(stop, in_a_thread(lambda: self.server.load(handed.name, handed.folder)))
            for last in (False, True):
                async with aclosing(self._asked(request, handed, stop)) as pieces:
                    try:
                        async for piece in pieces:
                            yield piece
                        return
                    except _Forgotten:
                        if last:
                            raise EngineFailed("the vLLM server forgets the LoRA") from None
                load = partial(self.server.load, handed.name, handed.folder, again=True)
                await _by(stop, in_a_thread(load))
        finally:
            self.server.release(handed.name)
            self.running -= 1

    def _prepared(self, request: TextRequest, stop: Stop) -> _Handed:
        """Finds, fetches, checks and publishes the adapters. Raises: LoraError; InvalidInput."""
        begun = time.perf_counter()
        ready = self.models.load(self.models.choose(request), strict=request.strict)
        stop.check()
        stack = [use for use in ready.stack if any(use.factors)]
        name, folder = "", Path()
        if stack:
            name = name_of(stack, self.source)
            folder = self.library.cache.shelf.prepare().absolute() / FOLDER / name
            publish(stack, folder, self.misfit, int(self.settings.max_lora_rank or 16))
        extras = {
            "seed": request.seed,
            "loras": ready.report,
            "timings": {"load": round(time.perf_counter() - begun, 4)},
            "warnings": [*self.parts.warnings, *request.warnings, *ready.warnings],
        }
        return _Handed(ready, self._body(request, ready, name), extras, name, folder)

    def _body(self, request: TextRequest, ready: Ready, name: str) -> dict[str, Any]:
        left_out = {*OURS, *WITHOUT_EFFECT, *UNSERVED}
        body = {k: v for k, v in request.rules.items() if v is not None and k not in left_out}
        body |= {"model": name or self.served}
        body["seed"] = request.seed if request.seed < 2**63 else request.seed - 2**64
        if request.kind == CHAT:
            body["messages"] = plain(request.messages)
            if own := ready.template:
                body["chat_template"] = own
        else:
            prompt = request.prompt
            body["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
        if request.stream and request.usage:
            body["stream_options"] = {"include_usage": True}
        return body

    async def _asked(
        self, request: TextRequest, handed: _Handed, stop: Stop
    ) -> AsyncGenerator[Any]:
        path = "/v1/chat/completions" if request.kind == CHAT else "/v1/completions"
        extras = {**handed.extras, "model": request.model or self.settings.name}
        limits = aiohttp.ClientTimeout(total=None, sock_connect=30)
        try:
            async with aiohttp.ClientSession(
                timeout=limits, headers=self.server.headers
            ) as session:
                asking = session.post(self.server.url + path, json=handed.body)
                answer = await _by(stop, asking)
                async with answer:
                    if answer.status != 200:
                        raise _refusal(answer.status, await _by(stop, answer.text()), handed.name)
                    if not request.stream:
                        yield {**json.loads(await _by(stop, answer.read())), **extras}
                        return
                    events = _Events(extras)
                    while chunk := await _by(stop, answer.content.readany()):
                        if text := events.of(chunk):
                            yield text
                    if not events.done:
                        raise EngineFailed("the vLLM server broke off", "Send the request again.")
        except (aiohttp.ClientError, json.JSONDecodeError) as error:
            raise unreachable() from error


class _Forgotten(Exception):
    """The server does not know an adapter any more."""


class _Events:
    """Server-sent events on their way: the model's name is the request's, and the last one has the extras."""

    def __init__(self, extras: Mapping[str, Any]) -> None:
        self._extras, self._rest = extras, b""
        self._last: dict[str, Any] | None = None
        self.done = False

    def of(self, chunk: bytes) -> str:
        """What may be sent on: one event is always held back, because it may be the last."""
        *events, self._rest = (self._rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        told = ""
        for event in events:
            data = event.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                self.done = True
                told += self._told(self._extras) + DONE
            elif event.startswith(b"data:"):
                told += self._told({"model": self._extras["model"]})
                self._last = found = json.loads(data)
                if "error" in found:
                    raise EngineFailed(f"the vLLM server failed: {said_in(data.decode())}")
        return told

    def _told(self, more: Mapping[str, Any]) -> str:
        last, self._last = self._last, None
        if last is None:
            return ""
        return f"data: {json.dumps({**last, **more}, ensure_ascii=False)}\n\n"


def _refusal(status: int, text: str, name: str) -> Exception:
    if status == 404 and name and name in text:
        return _Forgotten()
    said = said_in(text)
    if status in (400, 404, 422):
        return InvalidInput(f"the vLLM server refuses the request: {said}", HINT)
    return EngineFailed(f"the vLLM server answered {status}: {said}", "Send the request again.")


async def _by(stop: Stop, work: Awaitable[Any]) -> Any:
    """Waits within the job's time. Raises: DeadlineExceeded."""
    try:
        async with asyncio.timeout(stop.left):
            return await work
    except TimeoutError:
        raise stop.deadline_exceeded() from None


def command_of(settings: TextSettings, folder: Path, port: int) -> list[str]:
    """How a server for these settings is started, over the base in this folder."""
    packed = "bitsandbytes" if settings.quantisation in ("nf4", "bitsandbytes") else ""
    options = {
        "--host": "127.0.0.1",
        "--port": port,
        "--served-model-name": settings.name,
        "--max-loras": settings.max_loras or 8,
        "--max-cpu-loras": MOST,
        "--max-lora-rank": settings.max_lora_rank or 16,
        "--max-num-seqs": settings.most_rows,
        "--max-model-len": settings.context,
        "--dtype": settings.dtype,
        "--quantization": packed,
        "--tokenizer": settings.tokenizer,
        "--chat-template": settings.chat_template,
    }
    given = [text for name, value in options.items() if value for text in (name, str(value))]
    return ["vllm", "serve", str(folder), "--enable-lora", "--trust-request-chat-template", *given]
