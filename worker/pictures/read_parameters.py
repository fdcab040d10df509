"""`lora parameters PICTURE`: the request that a picture was drawn with, from the text inside of it."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from lora.errors import ToolError
from worker.pictures.embedded import text_of
from worker.pictures.parameters import read

EXAMPLE = "parameters out/first/1.png"

HINT = (
    "It is in PNG, JPEG and WebP files of this worker and of web UIs, unless a program took it out."
)


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's option."""
    parser.add_argument(
        "picture", type=Path, metavar="PICTURE", help="a png, jpeg or webp file, or its text"
    )


def run(options: Namespace) -> Mapping[str, Any]:
    """Reads the picture, or a .txt file with the text. Raises: ToolError, OSError."""
    path: Path = options.picture
    if path.suffix == ".txt":
        text: str | None = path.read_text(encoding="utf-8", errors="replace")
    else:
        try:
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as picture:
                text = text_of(picture)
        except (SyntaxError, ValueError, UnidentifiedImageError) as error:
            raise ToolError(f"{path} is no picture in png, jpeg or webp") from error
    if not text:
        raise ToolError(f"{path} holds no parameters", HINT)
    found = read(text)
    return {"input": found.input, "unused": found.unused, "warnings": found.warnings}


def show(result: Mapping[str, Any]) -> str:
    """The request, ready to be sent, and below it what it does not say."""
    lines = [json.dumps({"input": result["input"]}, indent=1, ensure_ascii=False)]
    if result["unused"]:
        lines.append(f"not used: {', '.join(result['unused'])}")
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"])])
