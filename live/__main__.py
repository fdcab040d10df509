"""Sends a folder of pictures, an animated GIF or WebP, a video or a camera to a worker, and shows figures.

    python -m live ws://127.0.0.1:8000/live SOURCE --prompt "..." --lora demo-stripes:0.8 --out FOLDER

A video or a camera (such as /dev/video0) needs the program ffmpeg. The key of an endpoint is read from
RUNPOD_API_KEY or WORKER_API_KEY.
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

from live.client import Client, first_message, frames_of
from lora.errors import CodedError, ToolError


def main(arguments: list[str] | None = None) -> int:
    """Runs one session; 0 if every frame was drawn or skipped, 2 if the worker could not serve it."""
    options = _parser().parse_args(arguments)
    try:
        changes = dict(map(_change, options.at))
        key = os.environ.get("RUNPOD_API_KEY") or os.environ.get("WORKER_API_KEY", "")
        frames = frames_of(options.source, options.size or 512)
        if options.loop:
            frames = chain.from_iterable(repeat(list(frames)))
        with Client(options.url, _first(options), key) as client:
            _say(f"ready: {client.ready}")
            for message in client.stream(islice(frames, options.frames), changes):
                if options.out and message.picture:
                    _keep(options.out, message.about.get("seq"), message.picture)
    except CodedError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    for line in client.figures.lines():
        _say(line)
    return 1 if client.figures.errors else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="live", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", help="the worker's WebSocket: ws://HOST:PORT/live")
    parser.add_argument("source", type=Path, help="folder, GIF, WebP, picture, video or camera")
    parser.add_argument("--prompt")
    parser.add_argument("--lora", action="append", metavar="SOURCE[:SCALE]", help="may be repeated")
    parser.add_argument("--preset", dest="lora_selection", action="append")
    parser.add_argument("--size", type=int, help="width and height in pixels")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--start", metavar="JSON", help="further fields of the first message")
    parser.add_argument(
        "--at",
        action="append",
        default=[],
        metavar="N=JSON",
        help='what frame N changes: 20={"lora_selection": "night"}',
    )
    parser.add_argument("--frames", type=int, help="how many frames at most")
    parser.add_argument("--loop", action="store_true", help="begin again at the source's end")
    parser.add_argument("--out", type=Path, help="folder for the pictures that come back")
    return parser


def _first(options: argparse.Namespace) -> dict[str, Any]:
    names = ("prompt", "lora_selection", "size", "steps", "seed")
    values = {name: getattr(options, name) for name in names}
    return first_message(
        {**values, "loras": options.lora and list(map(_lora, options.lora))}, options.start
    )


def _lora(text: str) -> dict[str, Any]:
    path, _, scale = text.rpartition(":")
    try:
        return {"path": path, "scale": float(scale)} if path else {"path": text}
    except ValueError:
        return {"path": text}


def _change(text: str) -> tuple[int, dict[str, Any]]:
    number, _, change = text.partition("=")
    if not number.isdigit():
        raise ToolError(f"--at {number[:20]} is no frame's number", 'Write 20={"prompt": "..."}.')
    return int(number), first_message({}, change)


def _keep(folder: Path, seq: int | None, picture: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ending = {b"\x89P": "png", b"RI": "webp"}.get(picture[:2], "jpg")
    (folder / f"{seq or 0:05}.{ending}").write_bytes(picture)


def _say(line: str) -> None:
    print(line)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
