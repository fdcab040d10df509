"""The LoRAs and the prompt of a job, with what its presets and the worker's defaults add."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from entries import parse_loras
from lora.engine.stack import LoraUse
from lora.errors import CodedError
from lora.fetch.sources import Reference
from lora.volume.presets import Presets
from schemas import MAX_LORAS, ImageRequest
from validation import InvalidInput, faults_of, field, filled
from worker.tags import has_tags, taken, with_tags

NONE = "none"
"""A job selects this to have no preset, not even the worker's default."""

UNLESS_THERE = "unless it is there already"


PRESET: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "loras": field(
            "array",
            [],
            "LoRAs as in a job; each is a source, or an object with `path`",
            maxItems=MAX_LORAS,
        ),
        "prompt_prefix": field("string|null", None, f"Text before the prompt, {UNLESS_THERE}"),
        "prompt_suffix": field(
            "string|null", None, f"Text behind the prompt and a comma, {UNLESS_THERE}"
        ),
        "trigger_words": field(
            "array",
            [],
            f"Words that are added to the prompt, each behind a comma, {UNLESS_THERE}",
            items={"type": "string"},
        ),
        "description": field("string|null", None, "A note for people; it changes no picture"),
    },
}


@dataclass(frozen=True)
class Ready:
    """A preset that was checked."""

    name: str
    loras: tuple[LoraUse[Reference], ...] = ()
    before: tuple[str, ...] = ()
    """Texts that come before the prompt."""
    after: tuple[str, ...] = ()
    """Texts that come behind it, each behind a comma."""
    warnings: tuple[str, ...] = ()


def ready(name: str, preset: Mapping[str, Any], lora_mode: str | None = None) -> Ready:
    """Checks a preset as strictly as the LoRAs that a job names. Raises: InvalidInput, with every fault."""
    faults = list(faults_of(PRESET, preset, ""))
    checked, values = Ready(name), filled(PRESET, preset)
    if not faults:
        before = _texts([values["prompt_prefix"]])
        after = _texts((*values["trigger_words"], values["prompt_suffix"]))
        loras, warnings, broken = parse_loras(values["loras"], lora_mode)
        checked = Ready(name, loras, before, after, warnings)
        words = {f"trigger_words[{n}]": word for n, word in enumerate(values["trigger_words"])}
        tags = (fault for text in (*before, *after) for fault in taken(text).faults)
        faults = [*faults_of({}, words, ""), *broken, *tags]
        if not (values["loras"] or before or after):
            faults = ["loras is empty, and nothing is added to the prompt"]
    if faults:
        sentence = f"preset {name!r}: {'; '.join(faults)}"
        raise InvalidInput(sentence, "Correct it in presets.json, or replace it with presets.set.")
    return checked


def _texts(values: Sequence[str | None]) -> tuple[str, ...]:
    stripped = (" ".join((text or "").split()).strip(",").strip() for text in values)
    return tuple(text for text in stripped if text)


@dataclass(frozen=True)
class Chosen:
    """A job's request with the additions of its presets."""

    request: ImageRequest
    presets: tuple[str, ...] = ()
    prompt: str | None = None
    """The prompt that is drawn, if it is not the job's own."""

    def as_answer(self) -> dict[str, Any]:
        """The answer's fields about presets and prompt, where they differ from the job's."""
        answer: dict[str, Any] = {"preset": list(self.presets)} if self.presets else {}
        return answer if self.prompt is None else {**answer, "prompt": self.prompt}


@dataclass(frozen=True)
class Selection:
    """The volume's presets, and the defaults of a job that asks for no LoRA."""

    presets: Presets
    default_preset: str = ""
    """LORA_DEFAULT_PRESET; empty for none."""
    default_loras: tuple[Mapping[str, Any], ...] = ()
    """LORA_CONFIG's, as entries of a job's `loras`."""

    def choose(self, request: ImageRequest, *, has_loras: bool) -> Chosen:
        """The request with its presets: their LoRAs first, then its own, then those of tags in prompts.

        `has_loras`: whether the job has a list of LoRAs, which may be empty. Jobs that have neither a list
        nor a tag nor a selection get the defaults. Raises: LoraNotFound if a preset is not there;
        InvalidInput if one, or a tag, has faults; LoraCorrupt if the presets cannot be read.
        """
        wanted = request.lora_selection
        if wanted is None and not has_loras and not has_tags(request):
            return _tagged(self._by_default(request), request)
        names = dict.fromkeys(
            name for name in wanted or () if name.strip().lower() not in ("", NONE)
        )
        chosen = _joined(request, (), [self._ready(name, request) for name in names])
        return _tagged(chosen, request)

    def _by_default(self, request: ImageRequest) -> Chosen:
        loras, _, faults = parse_loras(list(self.default_loras))
        if faults:
            raise InvalidInput.of(faults)
        names = [self.default_preset] if self.default_preset else []
        try:
            chosen = [self._ready(name, request) for name in names]
        except CodedError as error:
            raise type(error)(f"LORA_DEFAULT_PRESET: {error.sentence}", error.hint) from error
        return _joined(request, loras, chosen)

    def _ready(self, name: str, request: ImageRequest) -> Ready:
        return ready(name, self.presets.find(name), request.lora_mode)


def _joined(
    request: ImageRequest, defaults: tuple[LoraUse[Reference], ...], chosen: list[Ready]
) -> Chosen:
    added = (*defaults, *(lora for preset in chosen for lora in preset.loras))
    if not added and not chosen:
        return Chosen(request)
    loras = (*added, *request.loras)
    prompt = _prompt(request.prompt, chosen)
    names = tuple(preset.name for preset in chosen)
    warnings = [f"preset {p.name!r}: {sentence}" for p in chosen for sentence in p.warnings]
    request = replace(request, loras=loras, prompt=prompt, warnings=(*request.warnings, *warnings))
    return Chosen(request, names)


def _tagged(chosen: Chosen, own: ImageRequest) -> Chosen:
    """With the tags of the prompts, those that presets brought included. `own`: the job's own request."""
    request = with_tags(chosen.request)
    if (count := len(request.loras)) > MAX_LORAS:
        raise InvalidInput(
            f"loras: with those of the presets and tags there are {count}, "
            f"and at most {MAX_LORAS} can be applied"
        )
    drawn = None if request.prompt == own.prompt else request.prompt
    return Chosen(request, chosen.presets, drawn)


def _prompt(prompt: str, chosen: Sequence[Ready]) -> str:
    before: list[str] = []
    after: list[str] = [prompt] if prompt else []
    own = prompt.rstrip(" ,")
    for preset in chosen:
        for texts, side in ((preset.before, before), (preset.after, after)):
            for text in texts:
                if not _stands_in(text, " ".join((*before, *after))):
                    side.append(text)
    if own and len(after) > 1:
        after[0] = own  # a comma follows anyway
    return " ".join((*before, ", ".join(after))).strip()


def _stands_in(text: str, prompt: str) -> bool:
    """Whether the prompt has the text, as whole words, in whatever case."""
    words = re.escape(text.casefold())
    return re.search(rf"(?<!\w){words}(?!\w)", " ".join(prompt.casefold().split())) is not None
