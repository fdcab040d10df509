"""The parameters of chats and completions: their schema, and what a schema cannot say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from schemas import IMAGE_REQUEST
from validation import faults_of, field, number

CHAT, COMPLETION = "chat", "completion"

FORMS, _FORM = ("text", "json_object", "json_schema"), ("type", "json_schema")

WITHOUT_EFFECT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("parallel_tool_calls", "spaces_between_special_tokens", "best_of", "use_beam_search"),
)
"""Parameters of OpenAI's and vLLM's that are taken and change nothing; the answer says so."""

UNSERVED = ("tools", "tool_choice", "functions", "function_call")
"""Parameters that ask for calls of functions, which are refused unless they ask for none."""

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
    "response_format": field(
        "object|null", None, "`text`, `json_object`, or a `json_schema` that the text is held to"
    ),
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
    for name in (*WITHOUT_EFFECT, *UNSERVED):
        properties[name] = {"type": ["string", "object", "array", "number", "boolean", "null"]}
    return {"type": "object", "additionalProperties": False, "properties": properties}


SCHEMAS = {CHAT: _schema(_OF_CHAT), COMPLETION: _schema(_OF_COMPLETION)}


def faults_in(kind: str, body: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with a body of this kind but its LoRAs, each as a sentence."""
    faults = list(faults_of(SCHEMAS[kind], body, ""))
    if asked := [name for name in UNSERVED if body.get(name) not in (None, [], "none", "auto")]:
        faults.append(f"{', '.join(asked)}: no functions can be called here")
    faults += _faults_of_form(body.get("response_format"))
    bias = body.get("logit_bias")
    if isinstance(bias, Mapping):
        sound = all(
            str(k).isascii()
            and str(k).isdecimal()
            and isinstance(v, (int, float))
            and abs(v) <= 100
            for k, v in bias.items()
        )
        if not sound:
            faults.append("logit_bias: not an object of tokens and numbers from -100 to 100")
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


def _faults_of_form(form: object) -> list[str]:
    """What is wrong with a `response_format`; what the schema itself asks for is looked at later."""
    if not isinstance(form, Mapping):
        return []
    kind, told = form.get("type"), form.get("json_schema")
    faults = [f"response_format: there is no {key!r} in it" for key in form if key not in _FORM]
    if kind not in FORMS:
        faults.append(f"response_format.type must be one of {', '.join(FORMS)}")
    elif kind != "json_schema":
        if told is not None:
            faults.append(f"response_format: a json_schema does not go with the type {kind}")
    elif not isinstance(told, Mapping) or not isinstance(told.get("schema"), Mapping):
        faults.append("response_format.json_schema.schema is not an object")
    else:
        faults += [
            f"response_format.json_schema: there is no {key!r} in it"
            for key in told
            if key not in ("name", "description", "schema", "strict")
        ]
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
