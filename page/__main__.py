"""`python -m page --endpoint ID | --url URL | --local`"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import socket
import sys
import threading
import webbrowser

import uvicorn

from lora.errors import CodedError
from page.backend import RUNPOD, Backend, Endpoint
from page.own_server import OwnServer
from page.server import new_app

log = logging.getLogger("page")

HOST = "127.0.0.1"


def main() -> int:
    """Serves the page until Ctrl-C."""
    options = _options()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        listening = socket.create_server((HOST, options.port))
    except OSError as error:
        log.error("port %d cannot be used: %s", options.port, error.strerror)
        return 2
    with listening:
        try:
            backend = _backend(options)
        except (CodedError, ValueError, OSError) as error:
            log.error("the page cannot start: %s", error)
            return 2
        asyncio.run(_serve(backend, listening, open_it=options.open))
    return 0


async def _serve(backend: Backend, listening: socket.socket, *, open_it: bool) -> None:
    port = listening.getsockname()[1]
    config = uvicorn.Config(
        new_app(backend, port), log_level="warning", access_log=False, lifespan="off"
    )
    log.info("http://%s:%d/ is open (%s)", HOST, port, backend.about()["name"])
    if open_it:
        address = (
            f"http://{HOST}:{port}/"  # in a thread: some browsers return only when they are closed
        )
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    try:
        await uvicorn.Server(config).serve(sockets=[listening])
    finally:
        await backend.close()


def _backend(options: argparse.Namespace) -> Backend:
    """Raises: CodedError; what the setup of a worker raises."""
    if options.local:
        from page.local import from_environment

        return from_environment()
    url = options.url or f"{RUNPOD}/{options.endpoint}"
    return backend_of(url, os.environ.get("RUNPOD_API_KEY", ""))


def backend_of(url: str, key: str) -> Backend:
    """What answers at an address: an endpoint, if the address ends in an id, or a worker's own server.

    Raises: AddressInvalid.
    """
    return Endpoint(url, key) if re.search(r"/v2/[^/]+/?$", url) else OwnServer(url, key)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m page",
        description="A web page for a worker, on this machine.",
        epilog="RUNPOD_API_KEY is the key of --endpoint and --url; it stays in this process.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--endpoint", metavar="ID", help="an endpoint of RunPod's")
    which.add_argument(
        "--url", help="an endpoint by its address (.../v2/ID), or a worker's own server"
    )
    which.add_argument(
        "--local", action="store_true", help="a worker in this process, by its environment"
    )
    port = os.environ.get("PAGE_PORT", "7860")
    parser.add_argument(
        "--port", type=int, default=port, help="port; 0 takes a free one (PAGE_PORT, or 7860)"
    )
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    options = parser.parse_args()
    if not 0 <= options.port <= 65535:
        parser.error("--port must be from 0 to 65535")
    return options


if __name__ == "__main__":
    sys.exit(main())
