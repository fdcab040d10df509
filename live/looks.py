"""What frames are drawn with: LoRAs that are there, and prompts with what presets add.

`Looks` turns what a client asks for into a `Look`. Files that the session has used before are at hand; others
are fetched and parsed by the caller's thread, so the drawing goes on meanwhile.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from live.request import Asked
from lora.engine.stack import LoraUse, Stack
from lora.errors import nearest
from lora.fetch.sources import Reference
from lora.formats.adapter import LoraFile
from lora.formats.embeddings import TokenEmbedding
from lora.volume.loader import Loaded, LoraLibrary
from validation import InvalidInput

DRAWING = "unet"
"""The component that draws; an adapter's other layers change what a prompt means."""


@dataclass(frozen=True)
class Look:
    """A stack that is ready, and prompts."""

    uses: tuple[LoraUse[Reference], ...] = ()
    loaded: tuple[Loaded, ...] = ()
    prompt: str = ""
    negative: str | None = None
    presets: tuple[str, ...] = ()
    seed: int = 0
    warnings: tuple[str, ...] = ()

    @cached_property
    def files(self) -> tuple[LoraFile, ...]:
        """The parsed adapters, each once."""
        return tuple(dict.fromkeys(loaded.file for loaded in self.loaded))

    @cached_property
    def stack(self) -> tuple[LoraUse[LoraFile], ...]:
        """All LoRAs with all that they change."""
        return tuple(
            use.of(loaded.file) for use, loaded in zip(self.uses, self.loaded, strict=True)
        )

    @cached_property
    def _drawing(self) -> tuple[LoraUse[LoraFile], ...]:
        others = {layer.target.component for file in self.files for layer in file.layers} - {
            DRAWING
        }
        off = dict.fromkeys(sorted(others), 0.0)
        return tuple(
            replace(use, components={**use.components, **off}) for use in self.stack if use.scale
        )

    def drawing(self, done: float) -> Stack:
        """What changes the drawing network at this fraction of a frame's steps."""
        if not any(use.ranged for use in self._drawing):
            return self._drawing
        return tuple(replace(use, start=0.0, end=1.0) for use in self._drawing if use.holds(done))

    @cached_property
    def speaking(self) -> Stack:
        """What changes the text encoders."""
        return tuple(
            replace(use.without(DRAWING), start=0.0, end=1.0)
            for use in self.stack
            if any(_speaks(use, layer.target) for layer in use.lora.layers)
        )

    @cached_property
    def words(self) -> tuple[TokenEmbedding, ...]:
        """What its LoRAs teach the tokenizers."""
        pairs = zip(self.uses, self.loaded, strict=True)
        return tuple(word for use, one in pairs if use.scale for word in one.embeddings)

    @cached_property
    def meaning(self) -> Hashable:
        """All that decides what the encoded prompts are."""
        speaking = tuple((use.lora.identity, use.all_scales) for use in self.speaking)
        words = tuple(
            (word.word, one.file.identity) for one in self.loaded for word in one.embeddings
        )
        return self.prompt, self.negative, speaking, words if self.words else ()


def _speaks(use: LoraUse[LoraFile], target: Any) -> bool:
    return target.component != DRAWING and bool(use.scale_of(target))


class Looks:
    """Finds the look that is asked for; remembers the session's files."""

    def __init__(self, library: LoraLibrary, selection: Any) -> None:
        """`selection`: a `worker.selection.Selection`."""
        self._library, self._selection = library, selection
        self._files: dict[Reference, Loaded] = {}

    def of(self, asked: Asked, *, fetch: bool) -> Look | None:
        """The look; None if that needs a file that is not at hand, unless it may `fetch`.

        Raises: CodedError.
        """
        chosen = self._selection.choose(asked.request(), has_loras=asked.has_loras)
        request = chosen.request
        missing = [use.lora for use in request.loras if use.lora not in self._files]
        if missing and not fetch:
            return None
        for loaded in self._library.load_all(missing) if missing else ():
            self._files[loaded.reference] = loaded
        files = [self._files[use.lora] for use in request.loras]
        warnings = (*request.warnings, *(w for one in files for w in one.warnings))
        return Look(
            uses=_scaled(request.loras, files, dict(asked.scales)),
            loaded=tuple(files),
            prompt=request.prompt,
            negative=request.negative_prompt,
            presets=chosen.presets,
            seed=asked.seed,
            warnings=warnings,
        )

    def presets(self, names: Iterable[str], asked: Asked) -> list[Look]:
        """A look for each preset, fetched. Raises: CodedError."""
        looks = (
            self.of(replace(asked, lora_selection=(name,), scales=()), fetch=True) for name in names
        )
        return [look for look in looks if look]


def _scaled(
    uses: Iterable[LoraUse[Reference]], files: Iterable[Loaded], scales: Mapping[str, float]
) -> tuple[LoraUse[Reference], ...]:
    """With the scales that are asked for by name. Raises: InvalidInput if no LoRA has a name."""
    found, known, scaled = set[str](), list[str](), []
    for use, loaded in zip(uses, files, strict=True):
        names = names_of(loaded)
        known.append(names[0])
        mine = [name for name in names if name in scales]
        found.update(mine)
        scaled.append(replace(use, scale=float(scales[mine[0]])) if mine else use)
    if unknown := sorted(set(scales) - found):
        hint = nearest(unknown[0], known) or f"There are: {', '.join(known) or 'none'}."
        raise InvalidInput(f"scales: no LoRA of the stack has the name {unknown[0][:80]!r}", hint)
    return tuple(scaled)


def names_of(loaded: Loaded) -> tuple[str, ...]:
    """What a LoRA may be called in `scales`: its file's name without and with ending, and its source."""
    name = loaded.entry.name
    return name.rsplit("/", 1)[-1].rsplit(".", 1)[0], name, loaded.reference.path
