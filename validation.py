"""A JSON Schema's defaults, and what breaks it in sentences of our own."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from lora.errors import CodedError, nearest

WEB_OR_DATA, SHA256 = "^(https?://|data:image/)", "^[0-9a-fA-F]{64}$"

PATTERNS: Mapping[str, str] = {
    WEB_OR_DATA: "an http(s) URL or a data:image/ URI",
    SHA256: "64 hexadecimal digits",
}
"""Every pattern that a schema of ours uses, in words."""


ALIASES = {"path": ("url", "name", "file", "lora"), "scale": ("strength", "weight")}
"""What other programs call the fields of a LoRA's entry."""

Checked = tuple[dict[str, Any], list[str], list[str]]
"""An object's values, warnings, faults."""


class InvalidInput(CodedError):
    """The request breaks the schema; the sentence lists every fault with its path."""

    code = "INVALID_INPUT"

    @classmethod
    def of(cls, faults: Sequence[str]) -> InvalidInput:
        """The error that lists these faults, of which there is at least one."""
        count = "" if len(faults) == 1 else f"{len(faults)} faults: "
        return cls(count + "; ".join(faults), "docs/requests.md lists the fields.")


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
    """The values with aliases replaced by the right names, each with a warning; two names are a fault."""
    right, warnings, faults = dict(values), [], []
    for name in filter(ALIASES.__contains__, schema["properties"]):
        for alias in filter(values.__contains__, ALIASES[name]):
            if name in right:
                faults.append(f"{where}{alias} means {name}, which is given too")
            else:
                warnings.append(f"{where}{alias} was taken as {name}")
            right.setdefault(name, right.pop(alias))
    return right, warnings, faults


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
            yield f"{where}{extra} is not a field" + (f" ({_lower(hint)}?)" if hint else "")
        return
    say = _SENTENCES.get(str(error.validator))
    yield f"{name}: {say(value, limit) if say else error.message}"


_SENTENCES: Mapping[str, Callable[[str, Any], str]] = {
    "type": lambda value, limit: f"{value} is not {_kinds(limit)}",
    "enum": lambda value, limit: f"{value} is none of {', '.join(filter(None, limit))}",
    "minimum": lambda value, limit: f"{value} is less than {limit}",
    "maximum": lambda value, limit: f"{value} is more than {limit}",
    "multipleOf": lambda value, limit: f"{value} is not a multiple of {limit}",
    "maxItems": lambda value, limit: f"more than {limit} entries",
    "pattern": lambda value, limit: f"{value} does not look right ({PATTERNS[limit]})",
}


def _kinds(types: object) -> str:
    names = [str(t) for t in (types if isinstance(types, list) else [types])]
    return " or ".join(
        f"an {n}" if n[0] in "aio" else n if n == "null" else f"a {n}" for n in names
    )


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


NAMES_NO_LORA = "names no LoRA (a string or an object with path)"


def as_entry(given: object, schema: dict[str, Any], where: str) -> Checked:
    """An entry of `loras` as an object with `path`; an empty one if it names no LoRA."""
    entry = {"path": given} if isinstance(given, str) else given
    values, warnings, faults = renamed(schema, entry if isinstance(entry, Mapping) else {}, where)
    if not values.get("path"):
        return {}, [], faults
    return values, warnings, [*faults, *faults_of(schema, values, where)]
