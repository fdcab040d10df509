"""Textual inversion inside an adapter: vectors for new words of the prompt.

Layouts: `bundle_emb.WORD.clip_l`, `.clip_g` (OneTrainer, LyCORIS), `bundle_emb.WORD.string_to_param.*` (as
A1111 saves for one text encoder), and a file of just `clip_l`, `clip_g` or `emb_params`, whose word is the
file's name, as in ComfyUI: it stands for all rows together. A1111's own files have `string_to_param.*` for
the one text encoder of their model; there, too, the file's name is the word, and not the name within.
diffusers' `learned_embeds` have the word itself for a key, and are for the text encoder of their width.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from lora.formats.header import TensorInfo
from lora.formats.names.keys import KeyMap
from lora.formats.names.slots import split_key

ENCODERS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "emb_params": "text_encoder",
    "string_to_param": "text_encoder",
}
"""A text encoder's name in a file -> the component."""

BUNDLE = "bundle_emb."

A1111 = "string_to_param."
"""How the keys of A1111's embeddings begin."""

MAX_WORD = 102
"""Characters of a word that has no form of its own."""

_TOKEN = re.compile(r"<[^<>]{1,100}>")
"""The usual form of diffusers' words."""


@dataclass(frozen=True, eq=False)
class TokenEmbedding:
    """What one text encoder reads where the prompt has `word`."""

    word: str
    """Empty if the file's name is the word."""
    component: str
    vectors: Tensor
    """[tokens, width]."""


def is_embedding(key: str) -> bool:
    """Whether a key has the form of an embedding's key."""
    return key.startswith((BUNDLE, A1111)) or key in ENCODERS or bool(_TOKEN.fullmatch(key))


def word_keys(keys: Collection[str], tensors: Mapping[str, TensorInfo]) -> frozenset[str]:
    """Those of the keys that are an embedding's: by their form, or because they are all that the file has and
    none is a layer's. diffusers takes any key for a word.
    """
    formed = frozenset(filter(is_embedding, keys))
    if len(formed) == len(keys) or len(keys) < len(tensors):
        return formed
    plain = all(_is_plain(key, tensors[key].shape) for key in keys if key not in formed)
    return frozenset(keys) if plain else formed


def _is_plain(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a key could be a word: no tensor of a layer is called so."""
    word = key.strip() and len(key) <= MAX_WORD and key.count(".") <= 1 and split_key(key) is None
    return bool(word) and len(shape) in (1, 2)


def word_of(stem: str) -> str:
    """The word of a file of embeddings: the file's name, without the hash that the cache adds to it."""
    name, _, digest = stem.rpartition("-")
    cached = len(digest) == 16 and all(letter in "0123456789abcdef" for letter in digest)
    return name if name and cached else stem


def read_embedding(key: str, vectors: Tensor, key_map: KeyMap) -> TokenEmbedding | str:
    """The embedding under a key of that form, or the reason why it cannot be used."""
    word, kind = "", key
    if key.startswith(BUNDLE):
        stem, _, kind = key.removeprefix(BUNDLE).rpartition(".")
        if stem.endswith(".string_to_param"):
            stem = stem.removesuffix(".string_to_param")
            kind = kind if kind in ENCODERS else "string_to_param"
        word = stem.strip()
        if not word:
            return "the embedding does not say which word it is for"
    elif key.startswith(A1111):
        kind = "string_to_param"
    component = ENCODERS.get(kind)
    if component is None and not key.startswith(BUNDLE):
        return _learned(key, vectors, key_map)
    if component is None:
        behind = kind.endswith("_out")
        return "an embedding for behind the text encoder" if behind else "no text encoder of ours"
    vectors = vectors[None] if vectors.dim() == 1 else vectors
    return _trouble(vectors, component, key_map) or TokenEmbedding(word, component, vectors)


def _learned(word: str, vectors: Tensor, key_map: KeyMap) -> TokenEmbedding | str:
    """diffusers' form: the width tells the text encoder."""
    vectors = vectors[None] if vectors.dim() == 1 else vectors
    components = [name for name in dict.fromkeys(ENCODERS.values()) if name in key_map.components]
    reasons = [_trouble(vectors, name, key_map) for name in components]
    fitting = [name for name, reason in zip(components, reasons, strict=True) if reason is None]
    if len(fitting) > 1:
        return f"the vectors fit {' and '.join(fitting)}, and nothing tells which is meant"
    if not fitting:
        return next(filter(None, reasons), "no text encoder of ours")
    return TokenEmbedding(word, fitting[0], vectors)


def _trouble(vectors: Tensor, component: str, key_map: KeyMap) -> str | None:
    table = key_map.find(f"{component}.embeddings.token_embedding")
    if table is None:
        return f"this model has no {component}"
    width = table.parameters["weight"][1]
    shape = list(vectors.shape)
    if len(shape) != 2 or not shape[0] or shape[1] != width or not vectors.is_floating_point():
        return f"{shape} are no vectors of {component}, which reads {width} values per token"
    if not bool(vectors.float().isfinite().all()):  # a float64 may be too large
        return "the vectors overflow float32"
    return None
