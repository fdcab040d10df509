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
from schemas import IMAGE_REQUEST
from text.sampling import Sampling
from validation import InvalidInput, faults_of, field, filled, number

SHAPES = (
    "the input has none of: prompt or messages; openai_route (with openai_input); route (with body)"
)
HINT = "docs/text.md has the parameters."

CHAT, COMPLETION, MODELS = "chat", "completion", "models"

ROUTES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/models": MODELS,
}
"""Path behind `/openai` -> what it answers."""

WITHOUT_EFFECT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("parallel_tool_calls", "spaces_between_special_tokens", "best_of", "use_beam_search"),
)
"""Parameters of OpenAI's and vLLM's that are taken and change nothing; the answer says so."""

_SAMPLING: dict[str, Any] = {
    "max_tokens": number("integer|null", None, (1, 1_000_000), "Most tokens of the text"),
    "min_tokens": number("integer", 0, (0, 1_000_000), "Tokens before which it does not end"),
    "temperature": number("number|null", None, (0, 100), "0 takes the likeliest token always"),
    "top_p": number(
        "number|null", None, (0, 1), "Share of the likeliest tokens that is drawn from"
    ),
    "top_k": number(
        "integer|null", None, (-1, 1_000_000), "How many tokens are drawn from; 0 or -1: all"
    ),
    "min_p": number(
        "number|null", None, (0, 1), "Least probability, as a share of the likeliest's"
    ),
    "seed": number(
        "integer|null", None, (-(2**63), 2**64 - 1), "Same seed, same text; the answer tells it"
    ),
    "stop": field(
        "string|array|null",
        None,
        "Strings that end the text",
        items={"type": "string"},
        maxItems=16,
    ),
    "stop_token_ids": field(
        "array|null", None, "Tokens that end the text", items={"type": "integer"}
    ),
    "n": number("integer", 1, (1, 16), "How many texts, with seeds that follow each other"),
    "presence_penalty": number("number", 0.0, (-2, 2), "Against tokens that the text has"),
    "frequency_penalty": number("number", 0.0, (-2, 2), "The same, for each time"),
    "repetition_penalty": number(
        "number|null", None, (0.01, 100), "Divides what prompt and text have"
    ),
    "ignore_eos": field("boolean", False, "Goes on where the model would end"),
    "skip_special_tokens": field("boolean", True, "Leaves special tokens out of the text"),
    "logit_bias": field("object|null", None, "Token -> what is added to its logit"),
}
_REQUEST: dict[str, Any] = {
    "model": field("string|null", None, "The base, an adapter, or `base:adapter`"),
    "stream": field("boolean|null", False, "Answers piece by piece, as server-sent events"),
    "stream_options": field("object|null", None, "`include_usage`: the last event has the usage"),
    "response_format": field("object|null", None, 'Only `{"type": "text"}`'),
    **{
        name: IMAGE_REQUEST["properties"][name]
        for name in ("loras", "lora_selection", "strict_loras")
    },
}
_OF_CHAT: dict[str, Any] = {
    "messages": {"type": "array", "minItems": 1, "items": {"type": "object"}},
    "max_completion_tokens": number(
        "integer|null", None, (1, 1_000_000), "The same as `max_tokens`"
    ),
    "logprobs": field("boolean|null", None, "Tells the tokens' log-probabilities"),
    "top_logprobs": number("integer|null", None, (0, 20), "And those of so many others"),
    "add_generation_prompt": field("boolean", True, "Whether the assistant's turn begins"),
    "chat_template_kwargs": field("object|null", None, "Further variables of the chat template"),
}
_OF_COMPLETION: dict[str, Any] = {
    "prompt": field("string|array|null", None, "The text to go on with, or its tokens"),
    "logprobs": number("integer|null", None, (0, 20), "Log-probabilities of so many tokens"),
    "echo": field("boolean", False, "The prompt stands before the text"),
    "add_special_tokens": field("boolean", True, "With the tokens that begin each text"),
}


def _schema(own: Mapping[str, Any]) -> dict[str, Any]:
    properties = {**_SAMPLING, **_REQUEST, **own}
    for name in WITHOUT_EFFECT:
        properties[name] = {"type": ["string", "object", "array", "number", "boolean", "null"]}
    return {"type": "object", "additionalProperties": False, "properties": properties}


SCHEMAS = {CHAT: _schema(_OF_CHAT), COMPLETION: _schema(_OF_COMPLETION)}


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
    schema = SCHEMAS[kind]
    faults = [*faults_of(schema, body, ""), *_more_faults(kind, body)]
    strict = bool(body.get("strict_loras"))
    loras = parse_loras(body.get("loras"), strict=strict)
    faults += loras.faults
    if any(use.ranged or use.blocks or use.components for use in loras.uses):
        faults.append("loras: a language model has no start, end, blocks or components of a scale")
    if faults:
        count = "" if len(faults) == 1 else f"{len(faults)} faults: "
        raise InvalidInput(count + "; ".join(faults), HINT)
    rules = filled(schema, body)
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
        ),
    )


def _more_faults(kind: str, body: Mapping[str, Any]) -> list[str]:
    """What a schema cannot say."""
    faults = []
    form = body.get("response_format")
    if isinstance(form, Mapping) and form.get("type", "text") != "text":
        faults.append("response_format: only the type text is served")
    bias = body.get("logit_bias")
    if isinstance(bias, Mapping):
        sound = all(str(k).isdecimal() and isinstance(v, (int, float)) for k, v in bias.items())
        if not sound:
            faults.append("logit_bias: not an object of tokens and numbers")
    if kind == COMPLETION:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and not all(type(token) is int for token in prompt):
            faults.append("prompt: a list must be one of tokens; send a job for each text")
        if prompt in (None, "", []):
            faults.append("prompt is required")
    elif not isinstance(body.get("messages"), list):
        faults.append("messages is required")
    else:
        for place, message in enumerate(body["messages"]):
            faults += _faults_of_message(message, f"messages[{place}]")
    return faults


def _faults_of_message(message: object, where: str) -> list[str]:
    if not isinstance(message, Mapping):
        return []
    content = message.get("content")
    if not isinstance(message.get("role"), str):
        return [f"{where}.role is not a string"]
    parts = content if isinstance(content, list) else []
    if any(not isinstance(part, Mapping) or part.get("type") != "text" for part in parts):
        return [f"{where}.content: only parts of the type text are read"]
    return [] if isinstance(content, (str, list)) else [f"{where}.content is not a string"]


def plain(messages: tuple[Mapping[str, Any], ...]) -> list[dict[str, Any]]:
    """The messages with a string as content, as templates expect it."""
    return [
        {**m, "content": "".join(str(p.get("text", "")) for p in m["content"])}
        if isinstance(m["content"], list)
        else dict(m)
        for m in messages
    ]
