"""Detokenising: joined pieces are the text, and no piece shows what may still change."""

from __future__ import annotations

import pytest

from tests.text.small import tokenizer
from text.detokenise import HALF, Detokeniser

TEXTS = (
    "plain words",
    "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{FOX FACE}\N{OPEN BOOK}!",
    "\N{CJK UNIFIED IDEOGRAPH-4E2D}\N{CJK UNIFIED IDEOGRAPH-6587} and  blanks ",
)


def pieces(text: str, *stops: str) -> tuple[list[str], Detokeniser]:
    words = Detokeniser(tokenizer(), stops)
    told = []
    for token in tokenizer().encode(text, add_special_tokens=False):
        told.append(words.push(token))
        if words.stopped is not None:
            return told, words
    return [*told, words.finish()], words


@pytest.mark.parametrize("text", TEXTS)
def test_joined_pieces_are_the_text_and_no_character_is_told_by_halves(text: str) -> None:
    told, _ = pieces(text)
    assert "".join(told) == text
    assert not any(HALF in piece for piece in told)
    assert len([piece for piece in told if piece]) == len(text)


def test_half_a_character_at_the_end_is_told_as_such() -> None:
    words = Detokeniser(tokenizer())
    first, *_ = tokenizer().encode("\N{FOX FACE}", add_special_tokens=False)
    assert words.push(first) == ""
    assert words.finish() == HALF


def test_bytes_that_never_become_a_character_do_not_hold_the_text_for_ever() -> None:
    words = Detokeniser(tokenizer())
    continued = tokenizer().encode("\N{FOX FACE}", add_special_tokens=False)[1]
    told = [words.push(continued) for _ in range(40)]
    assert "".join(told).count(HALF) >= 16


@pytest.mark.parametrize(
    ("text", "stops", "wanted", "by"),
    [
        ("one two three", ("two",), "one ", "two"),
        ("one two three", ("tree", "thr"), "one two ", "thr"),
        ("ababac", ("abac",), "ab", "abac"),
        ("no stop in it", ("stop!", "itt"), "no stop in it", None),
        ("\N{FOX FACE}x\N{FOX FACE}y", ("\N{FOX FACE}y",), "\N{FOX FACE}x", "\N{FOX FACE}y"),
        ("first of both", ("of both", "of"), "first ", "of"),
        ("abc", ("",), "abc", None),
    ],
)
def test_a_stop_string_ends_the_text_and_no_part_of_it_is_told(
    text: str, stops: tuple[str, ...], wanted: str, by: str | None
) -> None:
    told, words = pieces(text, *stops)
    assert "".join(told) == wanted
    assert words.stopped == by
    for size in range(len(told)):
        assert wanted.startswith("".join(told[: size + 1]))


def test_special_tokens_are_shown_only_if_asked_for() -> None:
    end = tokenizer().eos_token_id
    for special, wanted in ((False, "a"), (True, "a<|end|>")):
        words = Detokeniser(tokenizer(), special=special)
        told = words.push(tokenizer().encode("a", add_special_tokens=False)[0]) + words.push(end)
        assert told + words.finish() == wanted
