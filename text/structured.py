"""Structured output: the tokens that may come next, so that a text becomes JSON which a schema describes.

The grammar is llguidance's. It is asked for a mask before each token of its own row alone, so rows with and
without one share a batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora.errors import CodedError

if TYPE_CHECKING:
    from llguidance import LLMatcher

LARGEST = 200_000
"""Characters of a schema."""

MOST_STATES = 30_000
"""States that the parser of one text may make; each takes one or two kB."""

BLANKS = r"[\x20\x0A\x0D\x09]{0,40}"
"""What may stand between two parts of the JSON. A weak model would write blanks until its tokens end."""

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
"""The schema of `{"type": "json_object"}`."""

HINT = "Leave out what the schema does not need; docs/text.md says what is read."


class SchemaUnsupported(CodedError):
    """The schema of a text is broken, too large, or asks for what is not read."""

    code = "SCHEMA_UNSUPPORTED"


class Grammar:
    """How far one text has come in its schema."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> Grammar:
        """The same place in the same schema, for another text."""
        return Grammar(self._matcher.deep_copy())

    @property
    def complete(self) -> bool:
        """Whether the JSON is whole and nothing can follow it."""
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())

    def mask(self, logits: Tensor) -> None:
        """Takes every token that cannot come next out of one row's logits, [vocabulary], in place.

        A schema that turns out to be too much takes none out, and `took` says so.
        """
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        if self._matcher.is_error():
            return
        known = (bits.to(logits.device)[:, None] >> torch.arange(8, device=logits.device)) & 1
        allowed = torch.zeros_like(logits, dtype=torch.bool)
        known = known.flatten()[: len(allowed)].bool()
        allowed[: len(known)] = known
        logits.masked_fill_(~allowed, -torch.inf)

    def took(self, token: int) -> None:
        """Goes on by a token. Raises: SchemaUnsupported if the schema cannot be followed any further."""
        if not self._matcher.consume_token(token):
            raise _refusal(self._matcher.get_error())


class Grammars:
    """Makes grammars over one model's tokens."""

    def __init__(self, tokenizer: Any, ends: frozenset[int]) -> None:
        """`ends`: the tokens that end a text. Raises: SchemaUnsupported if the tokens have no known bytes."""
        from llguidance import hf

        try:
            self._tokens = hf.from_tokenizer(tokenizer, eos_token=sorted(ends) or None)
        except (ValueError, AttributeError) as error:
            raise SchemaUnsupported(
                "this model's tokenizer is of a kind over which no schema can be held",
                "Leave out response_format.",
            ) from error

    def grammar(self, schema: Mapping[str, Any]) -> Grammar:
        """A text at its beginning. Raises: SchemaUnsupported."""
        from llguidance import LLMatcher, LLParserLimits

        try:
            text = json.dumps(schema)
        except RecursionError:
            raise _refusal("it is nested too deeply") from None
        if len(text) > LARGEST:
            raise _refusal(f"it has {len(text)} characters, and at most {LARGEST} are read")
        rules: Any = {"lenient": False, "whitespace_pattern": BLANKS, "whitespace_flexible": True}
        try:
            made = LLMatcher.grammar_from_json_schema(text, overrides=rules)
        except ValueError as error:
            raise _refusal(str(error)) from error
        limits = LLParserLimits(max_lexer_states=MOST_STATES, verbose_errors=False)
        matcher = LLMatcher(self._tokens, made, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some schemas show only here that no text fits them
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        return Grammar(matcher)


def _refusal(reason: str) -> SchemaUnsupported:
    said = " ".join(reason.replace("<non-verbose/>", "").split())[:300]
    if said in ("", "NoExtension", "NoExtensionBias"):
        said = "no text fits it"
    return SchemaUnsupported(f"the schema of response_format cannot be served: {said}", HINT)
