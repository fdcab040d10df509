"""Sampling: each rule beside a slow formula, and each row by its own numbers."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from tests.adapters import randn
from text.sampling import Chooser, Sampling, choose

VOCABULARY = 50


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return 3 * randn(rows, VOCABULARY, seed=seed)


def one(sampling: Sampling, given: torch.Tensor, prompt: tuple[int, ...] = ()) -> int:
    (chosen,) = choose(given, [Chooser(sampling, prompt, frozenset())])
    assert chosen is not None
    return chosen.token


def drawn(sampling: Sampling, given: torch.Tensor, count: int = 3000) -> Counter[int]:
    chooser = Chooser(sampling, (), frozenset())
    result: Counter[int] = Counter()
    for _ in range(count):
        (chosen,) = choose(given, [chooser])
        assert chosen is not None
        result[chosen.token] += 1
    return result


def allowed(sampling: Sampling, row: torch.Tensor) -> dict[int, float]:
    """The slow way: token -> probability, after temperature, min_p, top_k and top_p."""
    p = (row.double() / sampling.temperature).softmax(0).tolist()
    order = sorted(range(len(p)), key=lambda token: -p[token])
    order = [t for t in order if p[t] >= sampling.min_p * p[order[0]]]
    order = order[: sampling.top_k] if sampling.top_k > 0 else order
    whole, kept, before = sum(p[t] for t in order), [], 0.0
    for token in order:
        if before >= sampling.top_p and kept:
            break
        kept.append(token)
        before += p[token] / whole
    total = sum(p[t] for t in kept)
    return {token: p[token] / total for token in kept}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_p=0.8),
        Sampling(temperature=1.5, top_k=5),
        Sampling(temperature=1.2, min_p=0.1),
        Sampling(temperature=2.0, top_p=0.9, top_k=20, min_p=0.02),
        Sampling(temperature=1.0, top_p=1e-9),
    ],
)
def test_tokens_are_drawn_as_the_rules_say(sampling: Sampling) -> None:
    row = logits()
    right, seen = allowed(sampling, row[0]), drawn(sampling, row)
    assert set(seen) <= set(right)
    for token, share in right.items():
        spread = 5 * math.sqrt(share * (1 - share) / 3000) + 1e-3
        assert abs(seen[token] / 3000 - share) < spread, token


def test_without_temperature_the_likeliest_is_chosen_and_no_number_is_drawn() -> None:
    chooser = Chooser(Sampling(temperature=0), (), frozenset())
    before = chooser._generator.get_state()
    row = logits()
    (chosen,) = choose(row, [chooser])
    assert chosen is not None and chosen.token == int(row[0].argmax())
    assert torch.equal(chooser._generator.get_state(), before)


def test_a_seeds_tokens_do_not_depend_on_the_rest_of_the_batch() -> None:
    rows = logits(6, seed=3)
    rules = [
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0),
        Sampling(temperature=0.8, top_k=7, seed=2, presence_penalty=1.0),
        Sampling(temperature=1.4, top_p=0.7, seed=2**64 - 1),
        Sampling(temperature=1.0, min_p=0.2, seed=0, logprobs=3),
        Sampling(temperature=1.0, seed=5, repetition_penalty=1.3),
    ]

    def run(members: list[int]) -> dict[int, list[int]]:
        choosers = {m: Chooser(rules[m], (m, 2), frozenset()) for m in members}
        told: dict[int, list[int]] = {m: [] for m in members}
        for step in range(20):
            given = torch.stack([rows[m].roll(step) for m in members])
            for m, chosen in zip(members, choose(given, list(choosers.values())), strict=True):
                assert chosen is not None
                choosers[m].took(chosen.token)
                told[m].append(chosen.token)
        return told

    together = run(list(range(6)))
    assert all(run([m])[m] == together[m] for m in range(6))
    assert run([5, 3, 1]) == {m: together[m] for m in (5, 3, 1)}


def test_penalties_are_vllms() -> None:
    row = torch.zeros(1, VOCABULARY)
    row[0, 3], row[0, 4], row[0, 5] = 2.0, 1.5, -1.0
    chooser = Chooser(
        Sampling(
            temperature=0, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25
        ),
        (3, 5),
        frozenset(),
    )
    chooser.took(4)
    chooser.took(4)
    edited = row.clone()
    chooser.edit(edited[0])
    assert edited[0, 3] == 1.0 and edited[0, 5] == -2.0
    assert edited[0, 4] == 1.5 / 2 - 2 * 0.5 - 0.25
    assert edited[0, 6] == 0


def test_early_ends_are_held_back_and_biases_added() -> None:
    row = logits(seed=8)
    likeliest = int(row[0].argmax())
    ends = frozenset({likeliest})
    chooser = Chooser(Sampling(temperature=0, min_tokens=1), (), ends)
    (chosen,) = choose(row, [chooser])
    assert chosen is not None and chosen.token != likeliest
    chooser.took(chosen.token)
    (chosen,) = choose(row, [chooser])
    assert chosen is not None and chosen.token == likeliest
    assert one(Sampling(temperature=0, logit_bias={7: 100.0}), row) == 7
    assert Chooser(Sampling(ignore_eos=True), (), ends).ends == frozenset()


def test_logprobs_are_the_models_own() -> None:
    row = logits(2, seed=9)
    rules = [Sampling(temperature=0, logprobs=4), Sampling(temperature=0)]
    told, silent = choose(row, [Chooser(rule, (), frozenset()) for rule in rules])
    assert told is not None and silent is not None
    right = row[0].log_softmax(0)
    assert told.logprob == pytest.approx(float(right.max()), abs=1e-6)
    assert [token for token, _ in told.likeliest] == right.topk(4).indices.tolist()
    assert silent.logprob is None and silent.likeliest == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_whose_logits_are_no_numbers_has_no_token_and_the_others_do(value: float) -> None:
    rows = logits(2)
    rows[1, 4] = value
    good, bad = choose(rows, [Chooser(Sampling(temperature=1.0), (), frozenset())] * 2)
    assert good is not None and bad is None
