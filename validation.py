"""A JSON Schema's defaults, and what breaks it in sentences of our own."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from lora.errors import CodedError, nearest

PICTURE = r"(?i)^\s*(https?://|data:|[\w+/=\s-]{64,}$)"
SHA256 = "^[0-9a-fA-F]{64}$"

PATTERNS: Mapping[str, str] = {
    PICTURE: "an http(s) URL, a data URI or base64",
    SHA256: "64 hexadecimal digits",
}
"""Every pattern that a schema of ours uses, in words."""

ALIASES = {
    "path": ("url", "name", "file", "lora"),
    "scale": ("strength", "weight"),
    "num_inference_steps": ("steps", "num_steps"),
    "guidance_scale": ("cfg_scale", "cfg", "guidance"),
    "scheduler": ("sampler", "sampler_name"),
    "num_images": ("num_outputs", "num_images_per_prompt", "batch_size", "n"),
    "image_url": ("image", "init_image", "input_image"),
    "mask_url": ("mask", "mask_image"),
    "strength": ("denoising_strength", "prompt_strength"),
}
"""What other programs call the fields of a request and of a LoRA's entry."""

SPELLINGS = {
    "jpg": "jpeg",
    "euler": "keuler",
    "eulera": "keulerancestral",
    "eulerancestral": "keulerancestral",
    "lms": "klms",
}
"""What other programs call the values of a field, without case and separators."""

TEXTS = ("prompt", "negative_prompt", "lora_selection")
"""The fields in which blank text is a value of its own."""

TRUTHS = {"true": True, "1": True, "false": False, "0": False}

NUMBER = re.compile(r"[+-]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40})(e[+-]?\d{1,4})?", re.ASCII)
"""A number as text."""

Checked = tuple[dict[str, Any], list[str], list[str]]
"""An object's values, warnings, faults."""


class InvalidInput(CodedError):
    """The request breaks the schema; the sentence lists every fault with its path."""

    code = "INVALID_INPUT"
    faults: Sequence[str] = ()
    """The faults one by one, where the error lists any."""

    @classmethod
    def of(cls, faults: Sequence[str]) -> InvalidInput:
        """The error that lists these faults, of which there is at least one."""
        count = "" if len(faults) == 1 else f"{len(faults)} faults: "
        error = cls(count + "; ".join(faults), "docs/requests.md lists the fields.")
        error.faults = tuple(faults)
        return error


def field(types: str, default: Any, description: str, **limits: Any) -> dict[str, Any]:
    """One property of a schema; `types` is JSON Schema's types, separated by `|`."""
    names = types.split("|")
    kind = names if len(names) > 1 else names[0]
    return {"type": kind, **limits, "default": default, "description": description}


def number(
    types: str, default: float | None, limits: tuple[float, float], description: str
) -> dict[str, Any]:
    """The property of a number that lies within `limits`, both of them included."""
    low, high = limits
    return field(types, default, description, minimum=low, maximum=high)


def filled(schema: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Every property of the schema: the value given, else the default; 20.0 becomes 20."""
    filled: dict[str, Any] = {}
    for name, rule in schema["properties"].items():
        value = values.get(name, rule.get("default"))
        whole = "integer" in rule["type"] and isinstance(value, float)
        filled[name] = int(value) if whole else value
    return filled


def renamed(schema: Mapping[str, Any], values: Mapping[str, Any], where: str) -> Checked:
    """The values under their right names: aliases, camelCase and the like are replaced, each with a warning.

    Two names of one field are a fault.
    """
    names = schema["properties"]
    meant = {_squashed(alias): name for name in names for alias in ALIASES.get(name, ())}
    meant |= {_squashed(name): name for name in names}
    right = {name: value for name, value in values.items() if name in names}
    warnings, faults = list[str](), list[str]()
    for given in (given for given in values if given not in names):
        name = meant.get(_squashed(str(given)), given)
        if name in right:
            faults.append(f"{where}{given} means {name}, which is given too")
        elif name != given:
            warnings.append(f"{where}{given} was taken as {name}")
        right.setdefault(name, values[given])
    return right, warnings, faults


def understood(schema: Mapping[str, Any], values: Mapping[str, Any], where: str) -> Checked:
    """The values as the schema means them, from the shapes in which clients send them.

    Null, and blank text where none is wanted, are as good as not given. Text may stand for a number, for
    true and false, and for one of a list's values in another spelling; a single value for a list of it.
    What does not fit stays, for `faults_of` to tell. Names are as in `renamed`.
    """
    there = {name: value for name, value in values.items() if value is not None}
    right, warnings, faults = renamed(schema, there, where)
    rules = schema["properties"]
    meant = {
        name: _as_meant(rules[name], value) if name in rules else value
        for name, value in right.items()
        if name in TEXTS or not (isinstance(value, str) and not value.strip())
    }
    return meant, warnings, faults


def _as_meant(rule: Mapping[str, Any], value: Any) -> Any:
    types = rule["type"] if isinstance(rule["type"], list) else [rule["type"]]
    if isinstance(value, str) and "enum" in rule:
        options = {_squashed(option): option for option in rule["enum"] if option}
        return options.get(SPELLINGS.get(_squashed(value), _squashed(value)), value)
    if "string" in types:
        return value
    written = str(value).strip().lower() if isinstance(value, (str, int)) else ""
    if "boolean" in types:
        return TRUTHS.get(written, value)
    if isinstance(value, str) and {"integer", "number"} & {*types} and NUMBER.fullmatch(written):
        return int(written) if written.lstrip("+-").isdigit() else float(written)
    if isinstance(value, (str, Mapping)) and "array" in types:
        return [value]
    return value


def _squashed(text: str) -> str:
    """Text without its case, and without what separates words."""
    return re.sub(r"[\s_-]", "", text).lower()


def faults_of(schema: dict[str, Any], values: Mapping[str, Any], where: str) -> Iterator[str]:
    """Every breach of the schema, as `path: what is wrong`, in a fixed order."""
    for name, value in _leaves(values):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{where}{name}: {value} is not a number that JSON knows"
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            yield f"{where}{name}: the text holds half a surrogate pair, which is no character"
    errors = Draft202012Validator(schema).iter_errors(values)
    for error in sorted(errors, key=lambda e: [str(step) for step in e.absolute_path]):
        yield from _words(error, schema, where)


def _leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Every value that is no object and no list, with its path. Entries of `loras` have their own schema."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            for inner, one in value.items():
                yield f"{name}.{inner if re.fullmatch(NAME, str(inner)) else 'a field'}", one
        elif isinstance(value, list) and name != "loras":
            yield from ((f"{name}[{index}]", one) for index, one in enumerate(value))
        else:
            yield name, value


NAME = r"\w{1,40}"


def _words(error: ValidationError, schema: Mapping[str, Any], where: str) -> Iterator[str]:
    """One breach in words of our own; jsonschema's would repeat the whole value."""
    name = where + ".".join(str(step) for step in error.absolute_path)
    value, limit = _short(error.instance), error.validator_value
    if error.validator == "additionalProperties":
        for extra in sorted(str(k) for k in error.instance if k not in schema["properties"]):
            hint = nearest(extra, schema["properties"]).rstrip("?")
            yield f"{where}{extra} is not a field ({f'{_lower(hint)}?' if hint else 'leave it out'})"
        return
    say = _SENTENCES.get(str(error.validator))
    yield f"{name}: {say(value, limit) if say else error.message}"


_SENTENCES: Mapping[str, Callable[[str, Any], str]] = {
    "type": lambda value, limit: f"{value} is not {_kinds(limit)}",
    "enum": lambda value, limit: f"{value} is none of {', '.join(filter(None, limit))}",
    "minimum": lambda value, limit: f"{value} is less than {limit}",
    "maximum": lambda value, limit: f"{value} is more than {limit}",
    "multipleOf": lambda value, limit: (
        f"{value} is not a multiple of {limit}{_around(value, limit)}"
    ),
    "maxItems": lambda value, limit: f"more than {limit} entries",
    "maxLength": lambda value, limit: f"the text is longer than {limit} characters",
    "pattern": lambda value, limit: f"{value} does not look right ({PATTERNS[limit]})",
}


def _kinds(types: object) -> str:
    names = [str(t) for t in (types if isinstance(types, list) else [types])]
    return " or ".join(
        f"an {n}" if n[0] in "aio" else n if n == "null" else f"a {n}" for n in names
    )


def _around(value: str, step: int) -> str:
    """The multiples of `step` below and above a whole number, in words."""
    if not re.fullmatch(r"\d{1,9}", value):
        return ""
    below = int(value) // step * step
    return f" (send {below} or {below + step})" if below else f" (send {step})"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _short(value: object) -> str:
    """A value as an error may repeat it: numbers and plain words; all else may carry a secret."""
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, str) and re.fullmatch(r"[\w +-]{0,40}", value):
        return repr(value)
    kinds = {"str": "the text", "list": "the list", "dict": "the object"}
    return kinds.get(type(value).__name__, "the value")
