"""Cuts prompts into what the text encoders of SDXL read at once.

An encoder reads 77 tokens: a begin, 75 of the prompt, an end. A longer prompt is cut into chunks. No word is
cut in two, nor is one of a textual inversion, and all encoders have the same words in the same chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from lora.formats.embeddings import TokenEmbedding
from pipelines.syntax import Parsed, parse, split_at
from pipelines.tokens import TOKENIZERS, WordTokenizer, lengths
from schemas import MAX_PROMPT, ImageRequest
from validation import InvalidInput

MAX_CHUNKS = 32
"""Most chunks of a prompt: 2400 tokens."""


class Word(NamedTuple):
    """What must not be cut in two."""

    ids: tuple[Sequence[int], ...]
    """By tokenizer."""
    weight: float


class Row(NamedTuple):
    """The ids that an encoder reads at once, and their weights."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Chunk:
    """What the text encoders read at once."""

    words: tuple[Word, ...] = ()

    def row(self, index: int, tokenizer: Any, length: int) -> Row:
        """What one encoder reads, with begin, end and padding."""
        ids = [number for word in self.words for number in word.ids[index]]
        weights = [word.weight for word in self.words for _ in word.ids[index]]
        padding = length - len(ids) - 2
        ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * padding
        return Row(ids, [1.0, *weights, *[1.0] * (padding + 1)])


@dataclass(frozen=True)
class Chunked:
    """A prompt as the encoders will read it."""

    chunks: tuple[Chunk, ...]
    """At least one."""
    warnings: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """How many tokens it has, without begins, ends and padding; the most of any tokenizer."""
        words = [word.ids for chunk in self.chunks for word in chunk.words]
        return max((sum(map(len, one)) for one in zip(*words, strict=True)), default=0)

    @property
    def weighted(self) -> bool:
        """Whether any weight is not 1."""
        return any(word.weight != 1.0 for chunk in self.chunks for word in chunk.words)

    def padded(self, count: int) -> Chunked:
        """The same with empty chunks behind it, so that there are `count`."""
        return Chunked((*self.chunks, *[Chunk()] * (count - len(self.chunks))), self.warnings)


class Reader(NamedTuple):
    """A text encoder with its tokenizer."""

    tokenizer: Any
    encoder: Any

    @property
    def length(self) -> int:
        """Tokens that it reads at once, begin and end included: 77."""
        return int(self.encoder.config.max_position_embeddings)


def readers_of(pipeline: Any) -> dict[str, Reader]:
    """The pipeline's text encoders by name: two, or the second one alone in a refiner."""
    named = ((name, getattr(pipeline, name)) for name in TOKENIZERS)
    return {name: Reader(getattr(pipeline, TOKENIZERS[name]), one) for name, one in named if one}


@dataclass(frozen=True)
class Measured:
    """How a request's prompts will be read."""

    prompts: Mapping[str, Chunked]
    """By field; without a negative prompt that the request has not."""

    @property
    def warnings(self) -> list[str]:
        """What the answer must warn of."""
        return list(dict.fromkeys(text for one in self.prompts.values() for text in one.warnings))

    def as_answer(self) -> dict[str, Any]:
        """The answer's field about prompts of several chunks; empty if there is none."""
        counts = {
            name: {"tokens": one.tokens, "chunks": len(one.chunks)}
            for name, one in self.prompts.items()
        }
        several = any(len(one.chunks) > 1 for one in self.prompts.values())
        return {"prompt_tokens": counts} if several else {}


def measure(pipeline: Any, request: ImageRequest, embeddings: Sequence[TokenEmbedding]) -> Measured:
    """Reads the prompts without encoding them, as they will be read once the words of `embeddings` are added.

    Words that are added now, by another job that draws meanwhile, do not count.
    Raises: InvalidInput if a prompt is too long, a weight too large, or `clip_skip` skips all layers.
    """
    readers, words = readers_of(pipeline), lengths(embeddings)
    layers = min(int(reader.encoder.config.num_hidden_layers) for reader in readers.values())
    if (request.clip_skip or 1) > layers:
        raise InvalidInput(f"clip_skip: this model's text encoders have {layers} layers")
    counting = [
        reader._replace(tokenizer=WordTokenizer(reader.tokenizer, words.get(name, {})))
        for name, reader in readers.items()
    ]
    texts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    return Measured(
        {name: chunked(text, counting, name) for name, text in texts.items() if text is not None}
    )


def chunked(prompt: str, readers: Sequence[Reader], name: str = "prompt") -> Chunked:
    """The prompt of the field `name` in chunks.

    Raises: InvalidInput if it has over 10,000 characters or 32 chunks, or a weight over 100.
    """
    if len(prompt) > MAX_PROMPT:
        raise InvalidInput(
            f"{name}: with what presets add, it is longer than {MAX_PROMPT} characters"
        )
    tokenizers = [reader.tokenizer for reader in readers]
    added = set(chain.from_iterable(getattr(one, "added", ()) for one in tokenizers))
    try:
        parsed = parse(prompt, added)
    except ValueError as error:
        raise InvalidInput(f"{name}: {error}") from error
    room = min(reader.length for reader in readers) - 2
    chunks = tuple(
        Chunk(tuple(words))
        for section in _words(parsed, tokenizers, added)
        for words in _filled(section, room)
    )
    whole = Chunked(chunks or (Chunk(),), tuple(parsed.warnings))
    if len(whole.chunks) > MAX_CHUNKS:
        raise InvalidInput(
            f"{name}: {whole.tokens} tokens make {len(whole.chunks)} chunks, "
            f"and at most {MAX_CHUNKS} are drawn",
            f"Shorten it; a chunk holds {room} tokens.",
        )
    return whole


def _words(parsed: Parsed, tokenizers: Sequence[Any], added: set[str]) -> Iterator[list[Word]]:
    """The words of each section."""
    for section in parsed.sections:
        yield [
            Word(ids, piece.weight)
            for piece in section
            for text in split_at(piece.text, added)
            for ids in _ids(text, tokenizers, whole=text in added)
        ]


def _ids(
    text: str, tokenizers: Sequence[Any], *, whole: bool
) -> Iterable[tuple[Sequence[int], ...]]:
    """The ids of each word for each tokenizer; `whole`: the text is one word."""
    rows = [_by_word(one, text) for one in tokenizers]
    if whole:
        return [tuple(list(chain.from_iterable(row)) for row in rows)]
    return zip_longest(*rows, fillvalue=())


def _by_word(tokenizer: Any, text: str) -> list[Sequence[int]]:
    """The ids of each word: CLIP's tokens say where one ends."""
    own: Mapping[str, Sequence[int]] = getattr(tokenizer, "added", {})
    if text in own:
        return [own[text]]
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    words: list[list[int]] = [[]]
    for number, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        words[-1].append(number)
        if token.endswith("</w>"):
            words.append([])
    return [word for word in words if word]


def _filled(words: Iterable[Word], room: int) -> Iterator[list[Word]]:
    """The words in groups of at most `room` tokens, for every tokenizer. Only a longer word is cut."""
    group: list[Word] = []
    for whole in words:
        for word in _cut(whole, room):
            sizes = (
                sum(map(len, ids)) for ids in zip(*(w.ids for w in [*group, word]), strict=True)
            )
            if group and max(sizes) > room:
                yield group
                group = []
            group.append(word)
    if group:
        yield group


def _cut(word: Word, room: int) -> Iterator[Word]:
    for start in range(0, max(map(len, word.ids)), room):
        yield Word(tuple(ids[start : start + room] for ids in word.ids), word.weight)
