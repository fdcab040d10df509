"""Which token comes next: for every row of a batch by its own rules and its own random numbers.

A sampled token costs its row one number from its own generator, whatever the rest of the batch does, so a
seed gives the same tokens in any company (as far as the logits are the same: in float32 on a CPU they are).
Names and meaning are vLLM's: penalties, then temperature, min_p, top_k, top_p.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from text.structured import Grammar

GREEDY_BELOW = 1e-5
"""A lower temperature means: always the likeliest token."""


@dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen, and when it ends."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: all."""
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    """How many of the likeliest tokens are told beside the chosen one; None tells nothing."""

    @property
    def greedy(self) -> bool:
        """Whether no random number is drawn."""
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True)
class Chosen:
    """A row's next token."""

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()
    """Token and log-probability of the likeliest ones, by the model's own logits."""


class Chooser:
    """One row's rules with its state: the random numbers drawn, and the tokens seen."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        ends: frozenset[int],
        grammar: Grammar | None = None,
    ) -> None:
        """`ends`: the tokens that end a text of this model. With a `grammar`, `min_tokens` has no effect."""
        self.sampling, self._grammar = sampling, grammar
        self.ends = (frozenset() if sampling.ignore_eos else ends) | sampling.stop_token_ids
        self._generator = torch.Generator().manual_seed(sampling.seed % 2**63)
        self._penalised = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        self._said: Counter[int] = Counter()
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set[int]()

    def took(self, token: int) -> None:
        """Notes the token that was chosen. Raises: SchemaUnsupported if its schema leads no further."""
        if self._grammar is not None:
            self._grammar.took(token)
        self._said[token] += 1
        if self.sampling.repetition_penalty != 1:
            self._seen.add(token)

    @property
    def complete(self) -> bool:
        """Whether the text has a schema, and nothing can follow what is written."""
        return self._grammar is not None and self._grammar.complete

    def number(self) -> float:
        """The next random number, in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    @property
    def edits(self) -> bool:
        """Whether `edit` changes anything."""
        biased = self._penalised or self._seen or self.sampling.logit_bias
        return bool(biased or self._early or self._grammar)

    @property
    def _early(self) -> bool:
        return self._grammar is None and self._said.total() < self.sampling.min_tokens

    def edit(self, logits: Tensor) -> None:
        """Applies the penalties and biases to one row's logits, [vocabulary], in place."""
        sampling = self.sampling
        if self._seen:
            at = torch.tensor(sorted(self._seen), device=logits.device)
            values, penalty = logits[at], sampling.repetition_penalty
            logits[at] = torch.where(values > 0, values / penalty, values * penalty)
        if self._penalised and self._said:
            at = torch.tensor(list(self._said), device=logits.device)
            times = torch.tensor(list(self._said.values()), device=logits.device)
            logits[at] -= sampling.frequency_penalty * times + sampling.presence_penalty
        for token, bias in sampling.logit_bias.items():
            logits[token] += bias
        if self._early and self.ends:
            logits[torch.tensor(sorted(self.ends), device=logits.device)] = -torch.inf
        if self._grammar is not None:
            self._grammar.mask(logits)


def choose(logits: Tensor, rows: Sequence[Chooser]) -> list[Chosen | None]:
    """The next token of each row, from the logits [rows, vocabulary]; None where they are no numbers."""
    raw = logits.float()
    edited = raw
    for row, chooser in enumerate(rows):
        if chooser.edits:
            edited = raw.clone() if edited is raw else edited
            chooser.edit(edited[row])
    tokens = edited.argmax(-1)
    drawn = [row for row, chooser in enumerate(rows) if not chooser.sampling.greedy]
    if drawn:
        at = torch.tensor(drawn, device=raw.device)
        tokens[at] = _draw(edited[at], [rows[row] for row in drawn])
    sound = torch.isfinite(raw.amax(-1)) & ~raw.isnan().any(-1)
    told = _told(raw, tokens, rows)
    result: list[Chosen | None] = []
    for row, (token, good) in enumerate(zip(tokens.tolist(), sound.tolist(), strict=True)):
        result.append(told.get(row, Chosen(token)) if good else None)
    return result


def _draw(logits: Tensor, rows: Sequence[Chooser]) -> Tensor:
    """Sampled tokens, [rows]: the place of each row's random number in its cumulated probabilities."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    rules = [row.sampling for row in rows]
    vocabulary = logits.shape[-1]
    limits = [r.top_k if 0 < r.top_k < vocabulary else vocabulary for r in rules]
    scaled = logits / column([r.temperature for r in rules])
    if max(limits) < vocabulary:
        values, order = scaled.topk(max(limits), dim=-1)
    else:
        values, order = scaled.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(values.shape[-1], device=logits.device)
    first = values.softmax(-1)
    keep = first >= column([r.min_p for r in rules]) * first[:, :1]
    keep &= ranks < column([float(limit) for limit in limits])
    shares = values.masked_fill(~keep, -torch.inf).softmax(-1)
    before = shares.cumsum(-1) - shares
    shares = shares * ((before < column([r.top_p for r in rules])) | (ranks == 0))
    sums = shares.double().cumsum(-1)
    numbers = torch.tensor(
        [row.number() for row in rows], dtype=torch.float64, device=logits.device
    )
    places = torch.searchsorted(sums, numbers[:, None] * sums[:, -1:], right=True)
    last = (shares > 0).sum(-1, keepdim=True) - 1
    # a row of NaN has no place; its token is not used
    return order.gather(-1, torch.minimum(places, last).clamp(min=0))[:, 0]


def _told(raw: Tensor, tokens: Tensor, rows: Sequence[Chooser]) -> dict[int, Chosen]:
    """The log-probabilities of the rows that ask for them."""
    asked = {
        row: c.sampling.logprobs for row, c in enumerate(rows) if c.sampling.logprobs is not None
    }
    if not asked:
        return {}
    at = torch.tensor(list(asked), device=raw.device)
    logprobs = raw[at].log_softmax(-1)
    own = logprobs.gather(-1, tokens[at][:, None])[:, 0].tolist()
    most = max(1, *asked.values())
    values, places = logprobs.topk(min(most, raw.shape[-1]), dim=-1)
    told = {}
    for index, (row, count) in enumerate(asked.items()):
        likeliest = zip(places[index].tolist(), values[index].tolist(), strict=True)
        told[row] = Chosen(int(tokens[row]), own[index], tuple(likeliest)[:count])
    return told
