"""What `model` names, and the adapters of a request: found, fetched, parsed and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora.engine.stack import LoraUse, Stack
from lora.errors import LoraUnsupported, naming, nearest
from lora.fetch.sources import Reference
from lora.formats.adapter import LoraFile
from lora.formats.peft import PEFT_STEM
from lora.library.query import TRAINING, Query
from lora.library.states import Standing
from lora.volume.loader import Loaded, LoraLibrary
from schemas import MAX_LORAS
from text.loading import TextModel
from text_settings import TextSettings
from validation import InvalidInput
from worker.openai_answers import ModelNotFound
from worker.parts import Answer, Parts
from worker.reports import about, unused_keys
from worker.selection import NONE, ready
from worker.text.input import TextRequest

VOCABULARY = ("embed_tokens", "wte", "lm_head", "embed_in", "embed_out")
"""Names of the modules whose first axis is the vocabulary."""


@dataclass(frozen=True)
class Chosen:
    """The adapters of a request before they are fetched, and what to say of them."""

    uses: tuple[LoraUse[Reference], ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ready:
    """The adapters of a request, parsed."""

    stack: Stack
    loaded: tuple[Loaded, ...] = ()
    warnings: tuple[str, ...] = ()
    report: list[Answer] = field(default_factory=list)
    """What the answer says of each."""

    @property
    def template(self) -> str | None:
        """The chat template that the first of them brings; None if none does. Raises: LoraCorrupt."""
        for use, one in zip(self.stack, self.loaded, strict=True):
            with naming(one.reference.shown):
                if use.scale and (template := one.template):
                    return template
        return None


class Models:
    """Names and adapters of one text worker."""

    def __init__(
        self,
        settings: TextSettings,
        library: LoraLibrary,
        parts: Parts,
        misfit: Callable[[LoraFile], str | None],
    ) -> None:
        """`misfit` says why an adapter cannot share a batch."""
        self._settings, self._library, self._misfit = settings, library, misfit
        self._catalog, self._selection = parts.catalog, parts.selection

    def adapters(self) -> list[str]:
        """The names that `model` may have besides the base's: LORA_MODULES, and what the library has active.

        An adapter that is in the cache and was not activated may be named, too.
        """
        items = self._catalog_items()
        active = [name for name, standing in items.items() if standing is Standing.ACTIVE]
        return [*self._settings.modules, *sorted(set(active) - set(self._settings.modules))]

    def _catalog_items(self) -> dict[str, Standing]:
        items = self._catalog.page(Query(per_page=1_000_000)).items
        return {item.name: item.state.state for item in items if not item.name.startswith(TRAINING)}

    def named(self, model: str) -> LoraUse[Reference] | None:
        """The adapter that `model` names; None for the base. Raises: ModelNotFound, with near names."""
        base, modules = self._settings.name, self._settings.modules
        if model in ("", base, self._settings.model):
            return None
        name = model.removeprefix(f"{base}:").removeprefix(f"{self._settings.model}:")
        if name in modules:
            return LoraUse(Reference(modules[name]))
        if self._library.cache.shelf.existing(name):
            return LoraUse(Reference(name))
        cached = (one.removesuffix(f"/{PEFT_STEM}") for one in self._library.cache.shelf.names())
        names = [*self._settings.bases, *modules, *cached]
        raise ModelNotFound(
            f"there is no model {model[:200]!r}",
            nearest(name, names) or f"The base is {base}; /v1/models lists the adapters.",
        )

    def choose(self, request: TextRequest) -> Chosen:
        """The adapters of `model`, of presets and of `loras`, in this order; else the defaults.

        Raises: ModelNotFound; LoraNotFound for a preset that is not there; InvalidInput.
        """
        named = self.named(request.model)
        uses, warnings = [named] if named else [], list[str]()
        names = request.selection
        if names is None and not request.has_loras and named is None:
            default = self._selection.default_preset
            names = (default,) if default else ()
            uses += [
                LoraUse(Reference(str(entry["path"])), float(entry.get("scale", 1.0)))
                for entry in self._selection.default_loras
            ]
        for name in dict.fromkeys(n for n in names or () if n.strip().lower() != NONE):
            preset = ready(name, self._selection.presets.find(name))
            uses += preset.loras
            warnings += [f"preset {name!r}: {sentence}" for sentence in preset.warnings]
            if preset.before or preset.after:
                warnings.append(
                    f"preset {name!r}: its words for prompts of pictures have no effect"
                )
        uses += request.loras
        if len(uses) > MAX_LORAS:
            raise InvalidInput(
                f"there are {len(uses)} LoRAs, and at most {MAX_LORAS} can be applied"
            )
        return Chosen(tuple(uses), tuple(warnings))

    def load(self, chosen: Chosen, *, strict: bool) -> Ready:
        """Fetches and parses the adapters. Raises: LoraError; so does one of which nothing can be used, or
        with `strict` not all.
        """
        if not chosen.uses:
            return Ready((), warnings=chosen.warnings)
        loaded = tuple(self._library.load_all([use.lora for use in chosen.uses]))
        warnings = list(chosen.warnings)
        for one in loaded:
            warnings += [*_check(one, strict=strict), *one.warnings]
        return Ready(
            tuple(use.of(one.file) for use, one in zip(chosen.uses, loaded, strict=True)),
            loaded,
            tuple(warnings),
            [self._about(use, one) for use, one in zip(chosen.uses, loaded, strict=True)],
        )

    def _about(self, use: LoraUse[Reference], loaded: Loaded) -> Answer:
        alone = self._misfit(loaded.file)
        return {
            **about(loaded),
            "layers": loaded.file.modules if use.scale else 0,
            "used_keys": loaded.file.keys,
            "unused_keys": unused_keys(loaded),
            "scale": use.scale,
            "mode": "alone" if alone else "shared",
            "status": "applied" if use.scale else "scale is 0",
        }


def _check(loaded: Loaded, *, strict: bool) -> list[str]:
    """Warnings of tensors that are not used. Raises: LoraUnsupported."""
    unused, name = loaded.file.unused, loaded.reference.shown
    for one in unused:
        if any(part in one.key.split(".") for part in VOCABULARY) and "lora_" not in one.key:
            raise LoraUnsupported(
                f"{name} brings a vocabulary of its own ({one.key[:200]}: {one.reason})",
                "Train it without new tokens, or serve the base that has them.",
            )
    if not unused:
        return []
    total = loaded.file.keys + len(unused)
    told = f"{len(unused)} of {total} tensors"
    if strict:
        raise LoraUnsupported(
            f"{name}: {told} cannot be used ({unused[0].key[:200]}: {unused[0].reason})",
            "Leave out strict_loras to use the others.",
        )
    return [f"{loaded.entry.name}: {told} were not used (see unused_keys)"]


def prompt_of(
    request: TextRequest, text: TextModel, ready: Ready, messages: Sequence[Any]
) -> list[int]:
    """The prompt's tokens. Raises: ChatTemplateFailed; InvalidInput if it leaves no room for a text."""
    if messages:
        own = ready.template
        chat = text.with_template(own) if own else text.chat
        more = request.rules["chat_template_kwargs"] or {}
        words = chat.render(
            messages, **{"add_generation_prompt": request.rules["add_generation_prompt"], **more}
        )
        tokens = text.encode(words, special=False)
    elif isinstance(request.prompt, str):
        tokens = text.encode(request.prompt, special=request.rules["add_special_tokens"])
    else:
        tokens = list(request.prompt)
        if wrong := [token for token in tokens if not 0 <= token < text.vocabulary]:
            raise InvalidInput(f"prompt: {wrong[0]} is no token of this model")
    if not tokens:
        raise InvalidInput("prompt: it has no token")
    for name in ("logit_bias", "stop_token_ids"):
        if wrong := [
            int(t) for t in request.rules[name] or () if not 0 <= int(t) < text.vocabulary
        ]:
            raise InvalidInput(f"{name}: {wrong[0]} is no token of this model")
    most = request.rules["max_tokens"] or request.rules.get("max_completion_tokens") or 1
    if len(tokens) + most > text.context:
        raise InvalidInput(
            f"the prompt has {len(tokens)} tokens and max_tokens is {most}, "
            f"and together they may have {text.context}",
            "Shorten the prompt, or ask for fewer tokens.",
        )
    return tokens
