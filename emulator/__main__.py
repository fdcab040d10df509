"""`python -m emulator [options] -- python handler.py`"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from emulator.app import counts, new_app
from emulator.balancer import REQUEST_LIMIT, Balancer, Rules
from emulator.jobs import JobQueue
from emulator.worker_api import wire_environment
from emulator.workers import NoWorkerStarts, Scale, WorkerPool

log = logging.getLogger("emulator")

STATUS_EVERY = 5.0


def main() -> int:
    """Serves until Ctrl-C or SIGTERM, then ends every worker and every process that they started."""
    options = _options()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        listening = socket.create_server((options.host, options.port))
    except OSError as error:
        log.error("%s port %d cannot be used: %s", options.host, options.port, error.strerror)
        return 2
    homes = tempfile.TemporaryDirectory(prefix="emulator-", ignore_cleanup_errors=True)
    with listening, homes as folder:
        try:
            asyncio.run(_serve(options, listening, Path(folder)))
        except OSError as error:
            log.error("the workers cannot be started: %s", error)
            return 2
        except NoWorkerStarts as error:
            log.error("%s", error)
            return 1
    return 0


async def _serve(options: argparse.Namespace, listening: socket.socket, homes: Path) -> None:
    everywhere = options.host in ("", "0.0.0.0")
    port = listening.getsockname()[1]
    address = f"http://{'127.0.0.1' if everywhere else options.host}:{port}"
    key = secrets.token_hex(8)
    queue, balances = JobQueue(), bool(options.load_balancing)
    wire = {} if balances else wire_environment(address, options.endpoint, key)
    environment = _environment(options.volume) | wire
    scale = Scale(options.min_workers, options.workers, options.scale_delay, options.idle_timeout)
    pool = WorkerPool(options.command, environment, queue, scale, homes, serving=balances)
    beside = [asyncio.create_task(_status_line(queue, pool))]
    if balances:
        app: Any = Balancer(pool, Rules(options.api_key, options.request_limit))
        beside.append(asyncio.create_task(app.watch()))
        opened = f"{address} is open, and passes requests to healthy workers"
    else:
        app = _queue_app(options, queue, pool, key)
        opened = f"{address}/v2/{options.endpoint} is open; see {address} for its state"
    over = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    server = _Server(
        uvicorn.Config(
            app,
            log_level="warning",
            lifespan="off",
            timeout_keep_alive=75,  # the SDK posts on connections that were idle for a while
            timeout_graceful_shutdown=2,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    log.info("%s", opened)
    try:
        await pool.run(over)
    finally:
        # Only now, when the workers are gone: their posts had to be answered.
        for task in beside:
            task.cancel()
        queue.close()
        server.should_exit = True
        await serving


def _queue_app(
    options: argparse.Namespace, queue: JobQueue, pool: WorkerPool, worker_key: str
) -> FastAPI:
    return new_app(
        queue,
        pool,
        endpoint=options.endpoint,
        worker_key=worker_key,
        api_key=options.api_key,
        webhook_pause=options.webhook_pause,
    )


def _environment(volume: Path | None) -> dict[str, str]:
    """The variables that workers inherit."""
    variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
    variables.setdefault("RUNPOD_DEBUG_LEVEL", "INFO")  # by default the SDK logs each poll
    variables.pop("RUNPOD_REALTIME_PORT", None)  # with it the SDK serves HTTP and takes no jobs
    if volume:
        volume.mkdir(parents=True, exist_ok=True)
        variables["LORA_CACHE_DIR"] = str(volume.resolve() / "loras")
    return variables


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: at a signal the workers must end first."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _status_line(queue: JobQueue, pool: WorkerPool) -> None:
    """Logs the counts whenever they have changed."""
    last = None
    while True:
        now = counts(queue, pool)
        if now != last:
            log.info("  ".join(f"{name} {count}" for name, count in now.items()))
            last = now
        await asyncio.sleep(STATUS_EVERY)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m emulator",
        description="RunPod serverless on this machine: its public API over real worker processes.",
        epilog="Everything after -- is the worker's command; by default, python handler.py.",
    )
    add = parser.add_argument
    add("--workers", type=int, default=1, help="most workers (1)")
    add("--min-workers", type=int, help="least workers (as many as --workers)")
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", type=int, default=8000, help="port; 0 takes a free one (8000)")
    add("--endpoint", default="local", help="the endpoint's id in URLs (local)")
    add("--api-key", help="what clients must send as Bearer; none by default")
    add("--volume", type=Path, help="folder that stands for the network volume")
    add(
        "--scale-delay",
        type=float,
        default=4,
        help="seconds in the queue before one more starts (4)",
    )
    add("--idle-timeout", type=float, default=5, help="seconds before an idle extra one ends (5)")
    add("--webhook-pause", type=float, default=10.0, help="seconds between tries of a webhook (10)")
    add(
        "--load-balancing",
        action="store_true",
        help="requests go straight to the workers' own HTTP servers",
    )
    add(
        "--request-limit",
        type=float,
        default=REQUEST_LIMIT,
        help="seconds after which load balancing cuts a request off (330)",
    )
    add("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.min_workers is None:
        options.min_workers = options.workers
    if not (options.workers >= 1 and 0 <= options.min_workers <= options.workers):
        parser.error("--workers must be at least 1, --min-workers from 0 to --workers")
    if options.load_balancing and options.min_workers < options.workers:
        parser.error("--min-workers does nothing with --load-balancing: the number is fixed")
    if not 0 <= options.port <= 65535:
        parser.error("--port must be from 0 to 65535")
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    options.command = command or [sys.executable, "handler.py"]
    return options


if __name__ == "__main__":
    sys.exit(main())
