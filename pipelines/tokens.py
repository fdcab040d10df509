"""New prompt words while a block runs: textual inversion that leaves the model untouched.

Each vector of an embedding gets an id beyond the vocabulary. While the block runs, stand-ins replace the
pipelines' tokenizers and tell these ids to whoever encodes the prompt. Two `forward` methods of each text
encoder are shadowed on the instance: the encoder's own, which hides the new ids, and its token table's, which
returns the new vectors in their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora.errors import LoraIncompatible
from lora.formats.embeddings import TokenEmbedding

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""Text encoder -> its tokenizer, by the names that diffusers gives them."""


@contextmanager
def added_tokens(
    pipelines: Iterable[Any], embeddings: Sequence[TokenEmbedding]
) -> Iterator[tuple[str, ...]]:
    """Within the block, the words of `embeddings` stand for their vectors in all prompts of these pipelines.

    A word is found where the prompt has it in the same case and not as a part of a longer word (`art` is
    not in `party`); of several that begin at one place, the longest is taken. Each text encoder reads its
    own vectors, and reads the word as ordinary text if it has none. A pipeline with another text encoder
    (a refiner) reads the vectors too, if its tokens have the same width.

    Yields warnings. A word that comes twice keeps its first vectors, with a warning if the others differ:
    trainers give the same names (`<s0>`) to all files, and a stack with two such files should still draw.

    However the block ends, and after a failure to enter it, every tokenizer is the former object and every
    module has its own `forward`; no tensor and no config is ever written. Raises: LoraIncompatible if no
    pipeline can read a word's vectors; ValueError for an embedding without a word (the caller knows the
    file's name, which is the word then: see `word_of`).
    """
    if not all(one.word for one in embeddings):
        raise ValueError("an embedding without a word")
    vectors, warnings = _first_of_each(embeddings)
    pipelines, readers = list(pipelines), dict[nn.Module, _Reader]()
    with ExitStack() as undo:
        for component, words in vectors.items():
            fitting = [one for one in pipelines if _fits(getattr(one, component, None), words)]
            if not fitting:
                raise LoraIncompatible(
                    f"no {component} here can read the vectors of {', '.join(words)}",
                    "Choose a LoRA for the model that this worker runs.",
                )
            for pipeline in fitting:
                encoder, name = getattr(pipeline, component), TOKENIZERS[component]
                if encoder not in readers:
                    readers[encoder] = _Reader(encoder, words)
                    readers[encoder].install(undo)
                tokenizer = WordTokenizer(getattr(pipeline, name), readers[encoder].ids)
                # Not by setattr: diffusers would write the stand-in's class into the pipeline's config.
                _replace(undo, pipeline, name, tokenizer)
        yield warnings


def lengths(embeddings: Sequence[TokenEmbedding]) -> dict[str, dict[str, range]]:
    """Component -> word -> as many numbers as it has vectors, to count with before the words are added."""
    vectors, _ = _first_of_each(embeddings)
    return {
        component: {word: range(len(rows)) for word, rows in words.items()}
        for component, words in vectors.items()
    }


def _first_of_each(
    embeddings: Sequence[TokenEmbedding],
) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    """Component -> word -> vectors in float32, and the warnings."""
    first: dict[str, dict[str, Tensor]] = {}
    warnings: dict[str, None] = {}
    for one in embeddings:
        vectors = one.vectors.detach().float()
        kept = first.setdefault(one.component, {}).setdefault(one.word, vectors)
        if not torch.equal(kept, vectors):
            warnings[
                f'the word "{one.word}" comes with several LoRAs: the first one\'s is used'
            ] = None
    return first, tuple(warnings)


def _fits(encoder: nn.Module | None, words: Mapping[str, Tensor]) -> bool:
    """Whether there is an encoder, and its tokens have the width of the vectors."""
    if encoder is None:
        return False
    width = encoder.get_input_embeddings().embedding_dim  # type: ignore[operator]
    return all(vectors.shape[1] == width for vectors in words.values())


def _replace(undo: ExitStack, owner: object, name: str, value: object) -> None:
    """Sets an attribute on the instance; `undo` puts its former value back, or removes the new one."""
    own = vars(owner)
    if name in own:
        undo.callback(own.__setitem__, name, own[name])
    else:
        undo.callback(own.pop, name, None)
    own[name] = value


class _Reader:
    """Lets one text encoder read ids beyond its vocabulary.

    CLIP takes its pooled output at the end token, which it finds in the ids: as the largest id, where the
    config's eos_token_id is 2, as in SDXL's second encoder. So the encoder gets an ordinary id in place of
    each new one, and the true ids are handed to its token table directly.
    """

    def __init__(self, encoder: Any, words: Mapping[str, Tensor]) -> None:
        self._encoder, self._table = encoder, encoder.get_input_embeddings()
        self._encode, self._look_up = encoder.forward, self._table.forward
        self._beyond: int = self._table.num_embeddings
        self._vectors = torch.cat(list(words.values()))
        self._plain = 1 if encoder.config.eos_token_id == 0 else 0  # any id but the end's
        self._true_ids: Tensor | None = None
        self.ids: dict[str, range] = {}
        """Word -> the ids of its vectors."""
        next_id = self._beyond
        for word, vectors in words.items():
            self.ids[word] = range(next_id, next_id := next_id + len(vectors))

    def install(self, undo: ExitStack) -> None:
        """Shadows both `forward` methods, around whatever shadows them already (an offloading hook, say)."""
        _replace(undo, self._encoder, "forward", self.encode)
        _replace(undo, self._table, "forward", self.look_up)

    def encode(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The encoder's forward."""
        self._true_ids = input_ids
        plain = input_ids.masked_fill(input_ids >= self._beyond, self._plain)
        try:
            return self._encode(plain, *args, **kwargs)
        finally:
            self._true_ids = None

    def look_up(self, input_ids: Tensor) -> Tensor:
        """The token table's forward: [..., width], in the table's own precision and on its device."""
        out = self._look_up(input_ids)
        if (
            self._true_ids is None
        ):  # a call that does not come through the encoder: its ids are the true ones
            return out
        new = self._true_ids.to(out.device).reshape(input_ids.shape) - self._beyond
        vectors = self._vectors.to(out)[new.clamp(min=0)]
        return torch.where((new >= 0)[..., None], vectors, out)


class WordTokenizer:
    """A tokenizer of CLIP that has more words; everything else is passed on to the original.

    `pipelines.chunks` looks for the words first. A copy of the tokenizer with the words added would need no
    class, but copying CLIP's 49,408 tokens takes 475 ms (220 ms through its JSON) for each tokenizer, and a
    word that is a token already (`cat`) would keep its old id there.
    """

    def __init__(self, tokenizer: Any, added: Mapping[str, Sequence[int]]) -> None:
        """The tokenizer is not changed."""
        self._tokenizer = tokenizer
        self.added = added
        """Word -> its ids."""

    def __getattr__(self, name: str) -> Any:
        if name == "_tokenizer":  # during a copy there is no original yet
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        """What the original makes of a text, which has none of the words."""
        return self._tokenizer(text, **options)
