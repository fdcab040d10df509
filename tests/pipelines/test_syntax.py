"""The signs of a prompt mean what AUTOMATIC1111's web UI means by them."""

from __future__ import annotations

import pytest

from pipelines.syntax import MAX_WEIGHT, SCHEDULED, UNCLOSED, parse, pattern_of, split_at

Sections = list[list[tuple[str, float]]]


def read(prompt: str, *words: str) -> Sections:
    parsed = parse(prompt, words)
    return [[(piece.text, pytest.approx(piece.weight)) for piece in one] for one in parsed.sections]


SAME: dict[str, Sections] = {
    "": [[]],
    "a red circle": [[("a red circle", 1.0)]],
    "(abc)": [[("abc", 1.1)]],
    "(abc:3.12)": [[("abc", 3.12)]],
    "(abc : 1.5 )": [[("abc ", 1.5)]],
    "(abc:.5)(d:-1)(e:+2.)": [[("abc", 0.5), ("d", -1.0), ("e", 2.0)]],
    "[abc]": [[("abc", 1 / 1.1)]],
    "((abc))": [[("abc", 1.21)]],
    "([abc])": [[("abc", 1.0)]],
    r"\(literal\] \[x\) \\": [[("(literal] [x) \\", 1.0)]],
    r"saber_\(fate\)": [[("saber_(fate)", 1.0)]],
    r"a\b": [[("a\\b", 1.0)]],
    "(unnecessary)(parens)": [[("unnecessaryparens", 1.1)]],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        [
            *[("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1)],
            *[("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)],
        ]
    ],
    "(a [b) c]": [[("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)]],
    "x) y] z:1.2)": [[("x) y] z:1.2)", 1.0)]],
    "(a:b) 12:30": [[("a:b", 1.1), (" 12:30", 1.0)]],
    "(a:1.2:1.3)": [[("a:1.2", 1.3)]],
    "() [] (:1.3)": [[("  ", 1.0)]],
    "(a": [[("a", 1.1)]],
    "a BREAK b": [[("a", 1.0)], [("b", 1.0)]],
    "BREAK a BREAK BREAK b\nBREAK": [[("a", 1.0)], [("b", 1.0)]],
    "(a BREAK b:1.5)": [[("a", 1.5)], [("b", 1.5)]],
    "BREAKfast break": [[("BREAKfast break", 1.0)]],
    "BREAK": [[]],
}


@pytest.mark.parametrize(("prompt", "sections"), SAME.items(), ids=SAME.keys())
def test_signs(prompt: str, sections: Sections) -> None:
    assert read(prompt) == sections


def test_a_word_that_a_file_brings_is_text_whatever_it_is_made_of() -> None:
    assert read("a [V] (dog)") == [[("a ", 1.0), ("V", 1 / 1.1), (" ", 1.0), ("dog", 1.1)]]
    assert read("a [V] (dog)", "[V]", "<s0>") == [[("a [V] ", 1.0), ("dog", 1.1)]]
    assert read("(a style (v2):1.5)", "style (v2)") == [[("a style (v2)", 1.5)]]


def test_the_longest_word_is_found_and_none_within_another() -> None:
    assert split_at("dog10 dog1 adog1", ["dog1", "dog10"]) == ["dog10", " ", "dog1", " adog1"]
    assert split_at("a.b a+b", []) == ["a.b a+b"]
    assert pattern_of([]) == ""


@pytest.mark.parametrize("prompt", [":( sad", "((a)", "[a", "(a [b)"])
def test_a_bracket_that_is_never_closed_is_warned_of(prompt: str) -> None:
    assert parse(prompt).warnings == [UNCLOSED]


@pytest.mark.parametrize("prompt", ["[cat:dog:0.5]", "a [cat::3]", "[cat|dog]", "([a:0.5])"])
def test_prompts_that_would_change_from_step_to_step_are_warned_of(prompt: str) -> None:
    assert parse(prompt).warnings == [SCHEDULED]


@pytest.mark.parametrize("prompt", ["(a:1.3) [b]", r":\( a|b 12:30 [c]", ":) a)", "[see: this]"])
def test_what_means_something_is_not_warned_of(prompt: str) -> None:
    assert parse(prompt).warnings == []


@pytest.mark.parametrize(
    "prompt", ["(a:101)", "((a:20):20)", "(a:-500)", "(" * 9000, f"(a:{'9' * 999})"]
)
def test_a_weight_beyond_the_limit_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(prompt)
    assert str(caught.value) == f"a weight is over {MAX_WEIGHT}, all brackets multiplied"
