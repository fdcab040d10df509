"""The actions for a person who looks: an adapter's note, picture, hashes, description; a prompt's length."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from lora.errors import LoraNotFound
from lora.library.notes import Note
from lora.library.uploads import Piece, take
from lora.tools.adapters.hashes import hashes_of
from lora.tools.describe import describe
from lora.volume.adapters import StoredAdapter
from schemas import MAX_PROMPT, parse_job
from validation import SHA256, InvalidInput, field, number
from worker.parts import Answer, Parts
from worker.pictures.inputs import load_picture
from worker.pictures.thumbnails import data_uri, made, of_file
from worker.tags import taken

Fields = dict[str, dict[str, Any]]

MAX_DATA = 9_000_000
"""Characters of a piece of an upload: a job takes 10 MB in all."""

MAX_SETS, MAX_SET, MAX_TEXT = 50, 1000, 10_000
"""Sets of words in a note, and characters of one and of the text."""

NOTE: Fields = {
    "scale": number("number|null", None, (-10, 10), "Scale at which it is used by default"),
    "words": field(
        "array",
        [],
        "Sets of words for the prompt, each as one text",
        items={"type": "string", "maxLength": MAX_SET},
        maxItems=MAX_SETS,
    ),
    "text": field("string", "", "What else is to be known of it", maxLength=MAX_TEXT),
}

PICTURE: Fields = {
    "picture": field(
        "string|null",
        None,
        "An http(s) URL, a data URI or base64, such as a picture of an answer; null removes the thumbnail",
    )
}

NAMES: Fields = {
    "names": {
        "type": "array",
        "items": {"type": "string"},
        "minItems": 1,
        "maxItems": 100,
        "description": "Names of LoRAs in `library.list`",
    }
}


PIECE: Fields = {
    "data": {
        "type": "string",
        "maxLength": MAX_DATA,
        "description": "Base64 of the piece's bytes",
    },
    "start": number("integer", 0, (0, 10**12), "Where in the file the piece begins"),
    "size": number("integer", 0, (0, 10**12), "Bytes of the whole file"),
    "sha256": field("string", "", "SHA-256 of the whole file", pattern=SHA256),
}

PROMPT: Fields = {
    "prompt": {"type": "string", "maxLength": MAX_PROMPT, "description": "Prompt to be measured"}
}


def rows(parts: Parts) -> Mapping[str, tuple[Callable[[Mapping[str, Any]], Answer], Fields, str]]:
    """Action -> what answers it, its fields beside `name`, and the one that must be there."""
    return {
        "library.note": (lambda values: _note(parts, values), NOTE, "name"),
        "library.thumbnail": (lambda values: _thumbnail(parts, values), PICTURE, "name"),
        "library.thumbnails": (lambda values: _thumbnails(parts, values), NAMES, "names"),
        "library.hashes": (lambda values: _hashes(parts, values["name"]), {}, "name"),
        "library.describe": (lambda values: _describe(parts, values["name"]), {}, "name"),
        "library.upload": (lambda values: _upload(parts, values), PIECE, "name"),
        "prompts.measure": (lambda values: _measure(parts, values["prompt"]), PROMPT, "prompt"),
    }


def _note(parts: Parts, values: Mapping[str, Any]) -> Answer:
    words = tuple(text.strip() for text in values["words"] if text.strip())
    note = Note(values["scale"], words, values["text"].strip())
    return parts.catalog.note(values["name"], note).as_answer()


def _thumbnail(parts: Parts, values: Mapping[str, Any]) -> Answer:
    """Makes a thumbnail, or removes it. Raises: InvalidInput if what is given is no picture."""
    catalog, given = parts.catalog, values["picture"]
    catalog.find(values["name"])  # before a picture is fetched
    picture = None
    if given:
        web = parts.library.cache.web
        try:
            picture = made(load_picture(given, web))
        except InvalidInput as error:
            raise InvalidInput(
                error.sentence.replace("image_url", "picture"), error.hint
            ) from error
    answer = catalog.thumbnail(values["name"], picture).as_answer()
    return {**answer, "picture": data_uri(picture) if picture else None}


def _thumbnails(parts: Parts, values: Mapping[str, Any]) -> Answer:
    """The thumbnails of many at once; those that have none are left out."""
    found: dict[str, str] = {}
    for name in values["names"]:
        with suppress(LoraNotFound):  # deleted meanwhile
            path = parts.catalog.preview(name)
            if path and (uri := of_file(path)):
                found[name] = uri
    return {"thumbnails": found}


def _weights(adapter: StoredAdapter, name: str) -> str:
    if adapter.weights is None:
        raise LoraNotFound(f"{name} has no weights")
    return adapter.weights


def _hashes(parts: Parts, name: str) -> Answer:
    adapter = parts.catalog.find(name)
    return {"name": name, **asdict(hashes_of(adapter.root / _weights(adapter, name)))}


def _describe(parts: Parts, name: str) -> Answer:
    """What the file says and holds. No path of this machine is in it."""
    adapter = parts.catalog.find(name)
    weights = _weights(adapter, name)
    place = adapter.root / (adapter.path if adapter.is_folder else weights)
    return {**asdict(describe(place)), "file": name}


def _upload(parts: Parts, values: Mapping[str, Any]) -> Answer:
    """Takes a piece of a file. Raises: InvalidInput; LoraError."""
    if not (values.get("data") and values["sha256"]):
        raise InvalidInput("data and sha256 are required")
    try:
        data = base64.b64decode(values.get("data", ""), validate=True)
    except ValueError as error:
        raise InvalidInput("data: it is not valid base64") from error
    piece = Piece(values["name"], values["sha256"].lower(), values["size"], values["start"], data)
    there = take(parts.library.cache, piece)
    return {"name": piece.name, "there": there, "done": there == piece.size}


def _measure(parts: Parts, prompt: str) -> Answer:
    """How the text encoders will read a prompt, without its tags. Raises: InvalidInput, as a job would."""
    measure = getattr(parts.pipeline, "measure", None)
    if measure is None:
        raise InvalidInput("this worker draws no pictures")
    request = parse_job({"input": {"prompt": taken(prompt).text or " "}})
    measured = measure(request, ())
    one = measured.prompts["prompt"]
    return {"tokens": one.tokens, "chunks": len(one.chunks), "warnings": measured.warnings}
