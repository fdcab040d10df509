"""Messages -> prompt, by a chat template in a sandbox that bounds what it may do and how long it runs.

A template may come with an adapter, so anyone may have written it. It gets no attribute that leads out, calls
no filter but those that templates of language models use, builds no text beyond `LONGEST`, and runs at most
`MOST_LINES` lines of its compiled code.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from types import FrameType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lora.errors import CodedError

LONGEST = 4_000_000
"""Characters of a prompt, and of any text or list that a template builds on the way."""

MOST_LINES = 3_000_000
"""Lines of compiled code that one rendering may run."""

LARGEST_TEMPLATE = 400_000
"""Characters of a template."""

FILTERS = (
    *("capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "join"),
    *("last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace"),
    *(
        "reverse",
        "safe",
        "select",
        "selectattr",
        "sort",
        "string",
        "title",
        "trim",
        "unique",
        "upper",
    ),
)
"""The filters of jinja2's own that a template may call; `tojson` is ours."""

WIDENING = ("center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate")
"""Methods of texts that make long ones from short ones."""


class ChatTemplateFailed(CodedError):
    """The chat template cannot turn these messages into a prompt."""

    code = "CHAT_TEMPLATE_FAILED"


class _TooMuch(SecurityError):
    """A template went over a bound."""


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training, and means nothing here."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Generator(CodeGenerator):
    """Compiles `a ~ b` to a call of ours, which bounds the text."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - jinja2's
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("str(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")


def _joined(parts: Iterable[str]) -> str:
    parts = list(parts)
    _weigh(parts)
    return "".join(parts)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "+", "%"})
    code_generator_class = _Generator
    concat = staticmethod(_joined)  # type: ignore[assignment]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`*` and `**` of small numbers and short texts alone."""
        numbers = [abs(x) for x in (left, right) if isinstance(x, (int, float))]
        sized = [len(x) for x in (left, right) if isinstance(x, (str, list, tuple))]
        if operator == "**" and (max(numbers, default=0) > 1e6 or abs(right) > 16):
            raise _TooMuch("a power that is too large")
        if operator == "*" and sized and max(sized) * max(numbers, default=1) > LONGEST:
            raise _TooMuch("a text that is too long")
        if operator == "%" and isinstance(left, str):
            raise _TooMuch("formatting by %")
        return _bounded(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, *given: Any, **named: Any) -> Any:
        """A call whose numbers and answer are of a size that prompts need."""
        name, own = getattr(function, "__name__", ""), getattr(function, "__self__", None)
        if isinstance(own, str):
            if name in WIDENING:
                raise _TooMuch(f"the method {name}")
            _before(name, own, given)
        return _bounded(super().call(context, function, *given, **named))


def _before(name: str, first: Any, given: Sequence[Any]) -> None:
    """Weighs what `join` and `replace` would make, before they make it."""
    if name == "join":
        _weigh([first, *given])
    if name == "replace" and len(given) > 1 and isinstance(first, str):
        most = (len(first) + 1) * max(1, len(str(given[1])))
        if most > 16 * LONGEST:
            raise _TooMuch("a text that is too long")


def _weigh(value: Any) -> None:
    """Raises: _TooMuch if a value, written out, would be longer than a prompt may be."""
    left, todo = LONGEST, [value]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            todo += [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple)):
            todo += part
        left -= 1 + (len(part) if isinstance(part, (str, dict, list, tuple)) else 8)
        if left < 0:
            raise _TooMuch("a text that is too long")


def _bounded(value: Any) -> Any:
    if isinstance(value, (str, list, tuple, dict)) and len(value) > LONGEST:
        raise _TooMuch("a text that is too long")
    if isinstance(value, int) and value.bit_length() > 4096:
        raise _TooMuch("a number that is too large")
    return value


def _within(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of jinja2's with our bounds."""

    @wraps(work)  # jinja2 reads from its attributes what the filter wants to be given
    def bounded(*given: Any, **named: Any) -> Any:
        values = [
            one for one in given if not isinstance(one, (jinja2.Environment, Context, EvalContext))
        ]
        if name in ("join", "string", "list") and values:
            values[0] = values[0] if isinstance(values[0], (str, Mapping)) else list(values[0])
            _weigh(values[0])
            given = (*given[: len(given) - len(values)], *values)
        if values:
            _before(name, values[0], values[1:])
        return _bounded(work(*given, **named))

    return bounded


def _output(value: Any) -> Any:
    if not isinstance(value, str):
        _weigh(value)
    return value


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    known = {k: options[k] for k in ("ensure_ascii", "sort_keys", "separators") if k in options}
    _weigh(value)
    indent = min(indent, 16) if isinstance(indent, int) else None
    return json.dumps(value, **{"ensure_ascii": False, **known}, indent=indent)


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _environment() -> _Sandbox:
    sandbox = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        finalize=_output,
        cache_size=0,
    )
    sandbox.filters = {name: _within(name, sandbox.filters[name]) for name in FILTERS}
    sandbox.filters["tojson"] = _to_json
    sandbox.globals = {
        name: sandbox.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")
    }
    sandbox.globals["raise_exception"] = _raise
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(str(form)[:100])
    return sandbox


class ChatTemplate:
    """A template that was compiled once, and its tokenizer's special tokens."""

    def __init__(self, source: str, special: Mapping[str, str] = {}) -> None:
        """`special`: names such as `bos_token` -> the token. Raises: ChatTemplateFailed."""
        if len(source) > LARGEST_TEMPLATE:
            raise ChatTemplateFailed("the chat template is too long", HINT)
        self._special = dict(special)
        self._template = _guarded(lambda: _environment().from_string(source))

    def render(self, messages: Sequence[Mapping[str, Any]], **given: Any) -> str:
        """The prompt. `given`: further variables of the template, `add_generation_prompt` for one.

        Raises: ChatTemplateFailed, with what the template itself says of the messages.
        """
        variables = {**self._special, "messages": [dict(m) for m in messages], **given}

        def rendered() -> str:
            parts, size = [], 0
            for part in self._template.generate(variables):
                parts.append(part)
                size += len(part)
                if size > LONGEST:
                    raise _TooMuch("a prompt that is too long")
            return "".join(parts)

        return _guarded(lambda: _counted(rendered))


HINT = "Send a prompt instead of messages, or another CUSTOM_CHAT_TEMPLATE."


def _guarded(work: Callable[[], Any]) -> Any:
    """Runs a part of the template's work, and translates whatever comes out of it."""
    try:
        return work()
    except _TooMuch as error:
        raise ChatTemplateFailed(f"the chat template asks for {error}", HINT) from error
    except jinja2.TemplateError as error:
        said = str(error.message or "no reason given")[:500]
        raise ChatTemplateFailed(f"the chat template refuses the messages: {said}", HINT) from error
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        what = type(error).__name__
        raise ChatTemplateFailed(f"the chat template fails ({what})", HINT) from error


def _counted(work: Callable[[], str]) -> str:
    """Runs the template's compiled code line by line, at most `MOST_LINES` of them."""
    left, before = MOST_LINES, sys.gettrace()

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _TooMuch("more steps than a prompt needs")
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename == "<template>" else None

    sys.settrace(call)
    try:
        return work()
    finally:
        sys.settrace(before)
