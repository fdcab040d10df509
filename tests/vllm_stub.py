"""A stand-in for a vLLM server: its API, and a text that says what it was asked.

`python -m tests.vllm_stub --port N` starts it as a program.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any


class VllmStub:
    """Serves on a free port of this machine, or on `port`."""

    def __init__(self, base: str = "base", port: int = 0) -> None:
        self.base = base
        self.adapters: dict[str, Path] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        """Every POST: path and body."""
        self.fails: dict[str, tuple[int, str]] = {}
        """Path -> the status and message with which it answers."""
        self.endless = threading.Event()
        """While it is set, a stream comes to no end."""
        self.broken_off = threading.Event()
        """Set when a client has left a stream."""
        self.cut = False
        """Whether a stream ends before its end."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.get(self)

            def do_POST(self) -> None:
                outer.post(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def serve(self) -> None:
        """Serves until the process ends."""
        self._server.serve_forever()

    def __enter__(self) -> VllmStub:
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def asked(self, path: str) -> list[dict[str, Any]]:
        """The bodies that were posted there."""
        return [body for where, body in self.calls if where == path]

    def get(self, to: BaseHTTPRequestHandler) -> None:
        if to.path == "/metrics":
            return self._answer(to, 200, "vllm:num_requests_running 0\n")
        listed = [{"id": self.base, "root": f"/models/{self.base}", "parent": None}]
        listed += [
            {"id": name, "root": str(path), "parent": self.base}
            for name, path in self.adapters.items()
        ]
        return self._answer(to, 200, {"object": "list", "data": listed})

    def post(self, to: BaseHTTPRequestHandler) -> None:
        body = json.loads(to.rfile.read(int(to.headers["Content-Length"])))
        self.calls.append((to.path, body))
        if to.path in self.fails:
            status, message = self.fails[to.path]
            return self._answer(to, status, {"error": {"message": message, "code": status}})
        if to.path == "/v1/load_lora_adapter":
            return self._answer(to, *self._load(body["lora_name"], Path(body["lora_path"])))
        if to.path == "/v1/unload_lora_adapter":
            self.adapters.pop(body["lora_name"], None)
            return self._answer(to, 200, "Success")
        if body["model"] not in (self.base, *self.adapters):
            message = f"The model `{body['model']}` does not exist."
            return self._answer(to, 404, {"error": {"message": message, "code": 404}})
        return self._write(to, body)

    def _load(self, name: str, folder: Path) -> tuple[int, Any]:
        if name in self.adapters:
            return 400, {"error": {"message": f"{name} is loaded already"}}
        if not (folder / "adapter_config.json").is_file():
            return 404, {"error": {"message": f"{folder} does not exist"}}
        self.adapters[name] = folder
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _write(self, to: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        chat = "messages" in body
        asked = body["messages"][-1]["content"] if chat else body["prompt"]
        words = f"{body['model']} hears {asked}"
        head = {"id": "one", "created": 1, "model": body["model"]}
        if not body.get("stream"):
            own = {"message": {"role": "assistant", "content": words}} if chat else {"text": words}
            choice = {"index": 0, **own, "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
            return self._answer(to, 200, {**head, "choices": [choice], "usage": usage})
        to.send_response(200)
        to.send_header("Content-Type", "text/event-stream")
        to.end_headers()
        to.close_connection = True
        try:
            for event in self._events(words, chat, head):
                for start in range(0, len(event), 7):  # as networks do, in pieces
                    to.wfile.write(event[start : start + 7])
                    to.wfile.flush()
        except OSError:
            self.broken_off.set()
        return None

    def _events(self, words: str, chat: bool, head: dict[str, Any]) -> Iterator[bytes]:
        def event(text: str, finish: str | None) -> bytes:
            part: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
            value = {**head, "choices": [{"index": 0, **part, "finish_reason": finish}]}
            return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()

        for letter in words:
            yield event(letter, None)
        while self.endless.is_set():
            yield event(".", None)
            time.sleep(0.01)  # so that it fills no buffer
        if self.cut:
            return
        yield event("", "stop")
        yield b"data: [DONE]\n\n"

    def _answer(self, to: BaseHTTPRequestHandler, status: int, body: Any) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        with suppress(OSError):
            to.send_response(status)
            to.send_header("Content-Length", str(len(data)))
            to.end_headers()
            to.wfile.write(data)


if __name__ == "__main__":
    given = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
    VllmStub(given.get("--served-model-name", "base"), int(given["--port"])).serve()
