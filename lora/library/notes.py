"""What a person wrote of an adapter, in a file beside it: NAME.note.json.

It stays when the adapter changes, and goes when it is deleted.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora.volume.adapters import StoredAdapter
from lora.volume.records import read_as, write


@dataclass(frozen=True)
class Note:
    """A default scale, sets of words to choose from, and a text."""

    scale: float | None = None
    words: tuple[str, ...] = ()
    """Each set as it would stand in a prompt: `watercolor, soft light`."""
    text: str = ""

    def as_answer(self) -> dict[str, Any]:
        """The note, JSON-safe."""
        return {**asdict(self), "words": list(self.words)}


def read_note(path: Path) -> Note | None:
    """The note in a file; None if there is no file, or it holds no sound note."""
    with suppress(TypeError):
        if note := read_as(Note, path):
            note = replace(note, words=tuple(note.words))
            scale = note.scale
            sound = scale is None or (type(scale) in (int, float) and math.isfinite(scale))
            texts = (*note.words, note.text)
            return note if sound and all(isinstance(text, str) for text in texts) else None
    return None


def put_note(adapter: StoredAdapter, note: Note) -> None:
    """Writes a note in place of the one before; an empty note removes it. Raises: OSError."""
    if note == Note():
        adapter.note_path.unlink(missing_ok=True)
    else:
        write(adapter.root, adapter.note_path, note)
