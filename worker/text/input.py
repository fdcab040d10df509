"""What a text job asks for, in any of worker-vllm's shapes, as one request."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from entries import parse_loras
from lora.engine.stack import LoraUse
from lora.fetch.sources import Reference
from text.sampling import Sampling
from text.structured import ANY_OBJECT
from validation import InvalidInput, filled
from worker.text.parameters import CHAT, COMPLETION, SCHEMAS, WITHOUT_EFFECT, faults_in

SHAPES = (
    "the input has none of: prompt or messages; openai_route (with openai_input); route (with body)"
)
HINT = "docs/text.md has the parameters."

MODELS = "models"

ROUTES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/models": MODELS,
}
"""Path behind `/openai` -> what it answers."""


@dataclass(frozen=True)
class TextRequest:
    """A valid request. For `models`, everything but `kind` has its default."""

    kind: str
    model: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    prompt: str | tuple[int, ...] = ""
    rules: Mapping[str, Any] = None  # type: ignore[assignment]
    """The values of the schema's fields, with their defaults."""
    count: int = 1
    seed: int = 0
    stream: bool = False
    usage: bool = False
    """Whether the last event of a stream has the usage."""
    loras: tuple[LoraUse[Reference], ...] = ()
    selection: tuple[str, ...] | None = None
    has_loras: bool = False
    strict: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """What the text must be; None for anything."""
        form = (self.rules["response_format"] or {}) if self.rules else {}
        if form.get("type") == "json_object":
            return ANY_OBJECT
        schema: Mapping[str, Any] | None = form.get("json_schema", {}).get("schema")
        return schema

    def sampling(self, number: int, defaults: Mapping[str, float], room: int) -> Sampling:
        """The rules of the text of this number. `defaults`: the model's; `room`: what the context leaves."""
        rules = self.rules

        def of(name: str, otherwise: float) -> float:
            value = rules[name]
            return float(defaults.get(name, otherwise) if value is None else value)

        stop = rules["stop"] or ()
        most = rules["max_tokens"] or rules.get("max_completion_tokens")
        if most is None:
            most = 16 if self.kind == COMPLETION else room
        logprobs = rules["logprobs"]
        if self.kind == CHAT:
            logprobs = (rules["top_logprobs"] or 0) if logprobs else None
        return Sampling(
            max_tokens=most,
            temperature=of("temperature", 1.0),
            top_p=of("top_p", 1.0),
            top_k=int(of("top_k", 0)),
            min_p=of("min_p", 0.0),
            seed=self.seed + number,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=frozenset(rules["stop_token_ids"] or ()),
            min_tokens=rules["min_tokens"],
            ignore_eos=rules["ignore_eos"],
            presence_penalty=rules["presence_penalty"],
            frequency_penalty=rules["frequency_penalty"],
            repetition_penalty=of("repetition_penalty", 1.0),
            logit_bias={int(k): float(v) for k, v in (rules["logit_bias"] or {}).items()},
            logprobs=logprobs,
        )


def parse_text_job(job: object) -> TextRequest:
    """The job's request. Raises: InvalidInput, with every fault at once."""
    values = job.get("input") if isinstance(job, Mapping) else None
    if not isinstance(values, Mapping):
        raise InvalidInput("input is not an object", HINT)
    kind, body = _shape(values)
    if kind == MODELS:
        return TextRequest(MODELS)
    return _request(kind, body)


def _shape(values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What is asked for, and OpenAI's body, by worker-vllm's order of shapes."""
    ours = {k: values[k] for k in ("loras", "lora_selection", "strict_loras") if k in values}
    if "openai_route" in values or "openai_input" in values:
        body = values.get("openai_input")
        kind = _kind(values.get("openai_route") or "/v1/chat/completions")
        return kind, {**ours, **_object(body, "openai_input", needed=kind != MODELS)}
    if "route" in values:
        kind = _kind(values["route"])
        return kind, {**ours, **_object(values.get("body"), "body", needed=kind != MODELS)}
    if values.get("messages") is None and values.get("prompt") is None:
        raise InvalidInput(SHAPES, HINT)
    body = {k: v for k, v in values.items() if k not in ("sampling_params", "apply_chat_template")}
    kind = CHAT if body.get("messages") is not None else COMPLETION
    other = body.get("prompt" if kind == CHAT else "messages")
    if other is not None:
        raise InvalidInput("prompt and messages are given; only one can be meant", HINT)
    body.pop("prompt" if kind == CHAT else "messages", None)
    return kind, {**body, **_object(values.get("sampling_params"), "sampling_params", needed=False)}


def _kind(route: object) -> str:
    path = "/" + str(route).split("?")[0].strip("/").removeprefix("openai/")
    if path not in ROUTES:
        shown = path if re.fullmatch(r"[\w/.-]{1,80}", path) else "that route"
        raise InvalidInput(f"{shown} is not served", f"There are {', '.join(ROUTES)}.")
    return ROUTES[path]


def _object(value: object, name: str, *, needed: bool) -> Mapping[str, Any]:
    if value is None and not needed:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidInput(f"{name} is not an object", HINT)
    return value


def _request(kind: str, body: Mapping[str, Any]) -> TextRequest:
    faults = faults_in(kind, body)
    strict = bool(body.get("strict_loras"))
    loras = parse_loras(body.get("loras"), strict=strict)
    faults += loras.faults
    if any(use.ranged or use.blocks or use.components for use in loras.uses):
        faults.append("loras: a language model has no start, end, blocks or components of a scale")
    if faults:
        count = "" if len(faults) == 1 else f"{len(faults)} faults: "
        raise InvalidInput(count + "; ".join(faults), HINT)
    rules = filled(SCHEMAS[kind], body)
    selected, prompt = rules["lora_selection"], rules.get("prompt")
    seed = rules["seed"]
    return TextRequest(
        kind,
        model=rules["model"] or "",
        messages=tuple(rules.get("messages") or ()),
        prompt=prompt if isinstance(prompt, str) else tuple(prompt or ()),
        rules=rules,
        count=rules["n"],
        seed=secrets.randbits(32) if seed is None else seed % 2**64,
        stream=bool(rules["stream"]),
        usage=bool((rules["stream_options"] or {}).get("include_usage")),
        loras=loras.uses,
        selection=(selected,) if isinstance(selected, str) else selected and tuple(selected),
        has_loras=body.get("loras") is not None,
        strict=strict,
        warnings=(
            *loras.warnings,
            *(
                f"{name} has no effect here"
                for name in WITHOUT_EFFECT
                if body.get(name) is not None
            ),
            *(
                f"{name} has no effect with response_format, which says where the text ends"
                for name in ("min_tokens", "ignore_eos")
                if rules[name] and (rules["response_format"] or {}).get("type", "text") != "text"
            ),
        ),
    )


def plain(messages: tuple[Mapping[str, Any], ...]) -> list[dict[str, Any]]:
    """The messages with a string as content, as templates expect it."""
    return [
        {**m, "content": "".join(str(p.get("text", "")) for p in m["content"])}
        if isinstance(m["content"], list)
        else dict(m)
        for m in messages
    ]
