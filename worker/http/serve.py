"""Starts the worker's own server: `WORKER_SERVE=http python handler.py`."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import uvicorn

from settings import Settings, SettingsError
from worker.http.app import Kind, Serving, State, new_app, new_health_app

log = logging.getLogger("worker")

KEEP_ALIVE = 75
"""Seconds for which an idle connection stays open: longer than load balancers reuse theirs."""

MOST_PORT = 65535

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(settings: Settings, kind: Kind, load: Callable[[], object]) -> None:
    """Answers `/ping` at once, loads the worker beside it, and serves until SIGTERM or SIGINT.

    At the signal nothing more is taken, who waits is sent away, and what is worked on is finished; at a
    second one it is cancelled, and the weights are put back. Raises: SettingsError if a port cannot be used;
    whatever `load` raises; SystemExit if the process must not go on.
    """
    run, host = _Run(settings, kind, load), settings.host
    with ExitStack() as opened:
        sockets = [opened.enter_context(_listening(host, settings.port, "PORT"))]
        port = sockets[0].getsockname()[1]
        if settings.port_health not in (0, port):
            health = _listening(host, settings.port_health, "PORT_HEALTH")
            sockets.append(opened.enter_context(health))
        if not settings.api_key and host not in LOOPBACK:
            log.info("no WORKER_API_KEY: whoever reaches this machine's port %d may ask", port)
        asyncio.run(run.until_the_end(sockets))
    if run.gave_up:
        sys.exit("the worker ends, to be started anew")


def _listening(host: str, port: int, name: str) -> socket.socket:
    where = f"{name}: {host} port {port} cannot be used"
    if port > MOST_PORT:
        raise SettingsError(f"{where}: there is none above {MOST_PORT}")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise SettingsError(f"{where}: {error.strerror}") from None


class _Server(uvicorn.Server):
    """uvicorn's server without its own signal handlers."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def cancel(self) -> None:
        """Cancels what is worked on."""
        for task in self.server_state.tasks:
            task.cancel()


class _Run:
    """One run of the server, in its event loop."""

    def __init__(self, settings: Settings, kind: Kind, load: Callable[[], object]) -> None:
        self._load = load
        self.gave_up = False
        """Whether the process must not go on."""
        self._over = asyncio.Event()
        self._broken: BaseException | None = None
        self._servers: list[_Server] = []
        self.serving = Serving(settings, self._give_up)
        self._apps = (new_app(self.serving, kind), new_health_app(self.serving))

    async def until_the_end(self, sockets: Sequence[socket.socket]) -> None:
        """Serves. Raises: whatever keeps the server from going on."""
        self._loop = loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        self._servers = [
            _Server(
                uvicorn.Config(
                    app,
                    log_config=None,
                    access_log=False,
                    lifespan="off",
                    server_header=False,
                    timeout_keep_alive=KEEP_ALIVE,
                    ws_max_size=int(self.serving.settings.max_body_mb * 1e6),
                    ws_per_message_deflate=False,  # pictures are packed already
                )
            )
            for app, _ in zip(self._apps, sockets, strict=False)
        ]
        pairs = zip(self._servers, sockets, strict=True)
        running = [asyncio.create_task(server.serve([one])) for server, one in pairs]
        address = sockets[0].getsockname()
        log.info("http://%s:%d answers /ping; the models are loaded", *address[:2])
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._load_it, loop), daemon=True).start()
        await self._over.wait()
        log.info("the server ends: what is worked on is finished")
        self.serving.end()
        for server in self._servers:
            server.should_exit = True
        await asyncio.gather(*running)
        if self._broken:
            raise self._broken

    def _load_it(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._load()
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            loop.call_soon_threadsafe(self._ends, error)
        else:
            loop.call_soon_threadsafe(self._is_ready)

    def _is_ready(self) -> None:
        if self.serving.state is State.LOADING:
            self.serving.state = State.READY
            log.info("ready")

    def _give_up(self) -> None:
        """For any thread."""
        self.gave_up = True
        self._loop.call_soon_threadsafe(self._ends)

    def _ends(self, error: BaseException | None = None) -> None:
        self._broken = self._broken or error
        self._over.set()

    def _signalled(self) -> None:
        if self._over.is_set():
            log.info("once more: what is worked on is cancelled")
            for server in self._servers:
                server.cancel()
        self._ends()
