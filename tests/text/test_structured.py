"""Structured output: whatever a model would say, a row with a schema writes what fits it, and it alone."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import pytest
import torch

from lora.engine.stack import LoraUse
from tests.text.small import END, VOCABULARY, adapter, engine_of, prompts, text_model
from tests.waiting import PATIENCE
from text.generation import Generation
from text.sampling import Chooser, Sampling, choose
from text.scheduler import Scheduler
from text.structured import ANY_OBJECT, Grammar, SchemaUnsupported

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 1, None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": PERSON,
    "number": {"type": "number", "exclusiveMinimum": 3, "maximum": 5},
    "either": {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^[a-f]{2,4}$"}]},
    "constant": {"const": {"a": [1, "x", None], "b": {}}},
    "nested": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "date": {"type": "string", "format": "date"},
    "both": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ]
    },
}


def grammar(schema: dict[str, Any]) -> Grammar:
    return text_model().grammars.grammar(schema)


def written(own: Grammar, seed: int, most: int = 600) -> list[int] | None:
    """What a model of random logits writes; None if it comes to no end."""
    generator = torch.Generator().manual_seed(seed)
    chooser = Chooser(Sampling(temperature=1.0, seed=seed), (), frozenset({END}), own)
    favoured = [text_model().tokenizer.encode(mark)[0] for mark in '"}],:'] + [END]
    tokens: list[int] = []
    while len(tokens) < most:
        logits = torch.randn(1, VOCABULARY, generator=generator)
        logits[:, favoured] += 4  # so that strings and lists come to an end
        (chosen,) = choose(logits, [chooser])
        assert chosen is not None
        chooser.took(chosen.token)
        tokens.append(chosen.token)
        if chosen.token == END or chooser.complete:
            return tokens
    return None


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_logits_write_what_fits_the_schema(name: str) -> None:
    schema, ended = SCHEMAS[name], 0
    first = grammar(schema)
    for seed in range(8):
        tokens = written(first.copy(), seed)
        if tokens is None:
            continue
        ended += 1
        text = text_model().tokenizer.decode(tokens, skip_special_tokens=True)
        jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(
            json.loads(text)
        )
    assert ended > 4


def test_json_object_is_any_object() -> None:
    made = [written(grammar(dict(ANY_OBJECT)), seed) for seed in range(5)]
    ended = [tokens for tokens in made if tokens is not None]
    assert ended
    for tokens in ended:
        text = text_model().tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(json.loads(text), dict)


def test_rows_with_and_without_a_schema_share_a_batch_and_do_not_meet() -> None:
    text = text_model()
    engine = engine_of(text)
    scheduler = Scheduler(text, engine, most=8)
    file = adapter(engine, "plain")
    own = text.grammars.grammar(PERSON)

    def texts(schemas: list[bool]) -> list[Generation]:
        return [
            Generation(
                prompt,
                Sampling(40, temperature=0.0 if number % 2 else 1.3, seed=number, top_k=number),
                [LoraUse(file)] if number % 3 else [],
                grammar=own.copy() if held else None,
            )
            for number, (prompt, held) in enumerate(zip(prompts(6), schemas, strict=True))
        ]

    mixed = texts([True, False, True, False, True, False])
    free = texts([False] * 6)
    held = texts([True] * 6)
    scheduler.submit(*mixed)
    assert all(one.wait(PATIENCE) for one in mixed)
    for one in (*free, *held):  # each alone
        scheduler.submit(one)
        assert one.wait(PATIENCE)
    scheduler.close()
    assert [one.error for one in (*mixed, *free, *held)] == [None] * 18
    assert [one.tokens for one in mixed[1::2]] == [one.tokens for one in free[1::2]]
    assert [one.tokens for one in mixed[::2]] == [one.tokens for one in held[::2]]
    for one in held:
        words = "".join(piece.text for piece in one.pieces())
        if one.finish == "stop":
            jsonschema.validate(json.loads(words), PERSON)
        else:
            assert (one.finish, words[:1]) == ("length", "{")


def test_a_text_ends_with_its_json_whatever_else_is_asked() -> None:
    text = text_model()
    scheduler = Scheduler(text, engine_of(text), most=2)
    rules = Sampling(100, 0.0, min_tokens=90, ignore_eos=True)
    schema = {"const": {"done": True}}
    one = Generation([65], rules, grammar=text.grammars.grammar(schema))
    scheduler.submit(one)
    assert json.loads(one.text()) == {"done": True}
    assert one.finish == "stop" and len(one.tokens) < 90
    scheduler.close()


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def product(parts: int, choices: int) -> dict[str, Any]:
    """A small schema that means very many."""
    return {
        "allOf": [
            {"anyOf": [{"properties": {f"p{i}_{j}": {"type": "string"}}} for j in range(choices)]}
            for i in range(parts)
        ]
    }


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "foo"}, "foo"),
        ({"not": {"type": "string"}}, "not"),
        ({"if": {"type": "string"}, "then": {"minLength": 3}}, "if"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {}, "x-guidance": {"lenient": True}}, "not"),
        ({"type": "string", "format": "zzz"}, "zzz"),
        ({"type": "string", "pattern": "(a)(?=b)"}, "look"),
        ({"$ref": "http://127.0.0.1:1/schema"}, "retrieving"),
        ({"$ref": "file:///etc/passwd"}, "retrieving"),
        ({"$ref": "#"}, "no text fits"),
        ({"enum": []}, "empty"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"properties": []}, "properties"),
        (deep(20_000), "nested"),
        (deep(200), "recursion"),
        (product(8, 6), "too large"),
        ({"type": "string", "description": "x" * 300_000}, "characters"),
    ],
)
def test_a_schema_that_cannot_be_held_is_refused_with_the_reason(
    schema: dict[str, Any], said: str
) -> None:
    begun = time.process_time()
    with pytest.raises(SchemaUnsupported) as refused:
        grammar(schema)
    assert said in refused.value.sentence
    assert len(refused.value.sentence) < 500 and refused.value.hint
    assert time.process_time() - begun < 5


def test_a_schema_that_turns_out_to_be_too_much_ends_its_own_row_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("text.structured.MOST_STATES", 25)
    text = text_model()
    scheduler = Scheduler(text, engine_of(text), most=4)
    hard = {"type": "string", "pattern": "^(a|b)*a(a|b){9}$"}
    texts = [
        Generation([70 + n], Sampling(200, 1.5, seed=n), grammar=text.grammars.grammar(hard))
        for n in range(3)
    ]
    other = Generation([65], Sampling(60, 0.0, ignore_eos=True))
    scheduler.submit(*texts, other)
    assert all(one.wait(PATIENCE) for one in (*texts, other))
    scheduler.close()
    assert any("too many states" in str(one.error) for one in texts)
    assert other.error is None and len(other.tokens) == 60


def test_more_logits_than_tokens_are_never_chosen() -> None:
    """Models pad their vocabulary; what no tokenizer knows is in no schema."""
    own = grammar({"const": 7})
    logits = torch.zeros(VOCABULARY + 100)
    own.mask(logits)
    left = [token for token, value in enumerate(logits.tolist()) if value == 0]
    assert left == text_model().tokenizer.encode("7")


def test_a_tokenizer_without_bytes_is_refused_by_name() -> None:
    text = text_model()
    object.__setattr__(text, "tokenizer", object())
    with pytest.raises(SchemaUnsupported) as refused:
        _ = text.grammars
    assert "tokenizer" in refused.value.sentence
