"""What can be read from an adapter's header alone: algorithm, rank, base model, trigger words."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from lora.formats.algorithms import Recipe, recipes
from lora.formats.algorithms.oft import OFT
from lora.formats.alphas import RANKED
from lora.formats.embeddings import BUNDLE, word_keys
from lora.formats.header import Header
from lora.formats.names.families import identify
from lora.formats.names.slots import split_key
from lora.library.states import State

MAX_WORDS, MAX_WORD, MAX_TAGS = 20, 100, 5
"""How many words are kept, how long each may be, and how many of them may be tags of images."""


def summarised(state: State, header: Header) -> State:
    """The state with what the header says. Reads no tensor: modules differ by their names in the file.

    Algorithms stand in the order of their frequency; the rank is the most frequent one.
    """
    modules = _by_stem(header)
    algorithms: Counter[str] = Counter()
    ranks: Counter[int] = Counter()
    for slots in modules.values():
        matches, _ = recipes(frozenset(slots))
        algorithms.update(_name_of(match, slots) for match in matches)
        shape = next((slots[name] for name in RANKED if name in slots), ())
        ranks.update(shape[:1])
    if word_keys(header.tensors, header.tensors):
        algorithms["textual inversion"] += 1
    return replace(
        state,
        algorithm="+".join(name for name, _ in algorithms.most_common()) or None,
        rank=ranks.most_common(1)[0][0] if ranks else None,
        base=identify(header),
        words=trigger_words(header),
        layers=len(modules),
    )


def _name_of(match: Recipe, slots: Mapping[str, tuple[int, ...]]) -> str:
    if match.magnitude:
        return "dora"
    if match.algorithm is OFT:  # its own name depends on its tensor's shape
        return "boft" if len(slots["oft_blocks"]) == 4 else "oft"
    return match.algorithm.name


def _by_stem(header: Header) -> Mapping[str, dict[str, tuple[int, ...]]]:
    """Module's name in the file -> slot -> shape."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    words = word_keys(header.tensors, header.tensors)
    for key, info in header.tensors.items():
        if key in words:
            continue
        if parts := split_key(key):
            modules.setdefault(parts[0], {})[parts[1]] = info.shape
    return modules


def trigger_words(header: Header) -> tuple[str, ...]:
    """The words that the adapter was trained on, as far as its trainer wrote them down.

    They come from its embeddings, `modelspec.trigger_phrase`, and kohya's `ss_tag_frequency`: the names of
    the image folders ("10_NAME") and the most frequent tags.
    """
    words = (" ".join(word.split())[:MAX_WORD] for word in _words(header))
    return tuple(dict.fromkeys(word for word in words if word and word.isprintable()))[:MAX_WORDS]


def _words(header: Header) -> Iterator[str]:
    for key in header.tensors:
        if key.startswith(BUNDLE):
            yield key.removeprefix(BUNDLE).partition(".")[0]
    yield from header.metadata.get("modelspec.trigger_phrase", "").split(",")
    tags: Counter[str] = Counter()
    for folder, counts in _tag_table(header).items():
        yield re.sub(r"^\d+_", "", folder)
        tags.update(counts)
    yield from (tag for tag, _ in tags.most_common(MAX_TAGS))


def _tag_table(header: Header) -> Mapping[str, Mapping[str, int]]:
    """Folder -> tag -> count; empty if the metadata is not what kohya's trainer writes."""
    try:
        table = json.loads(header.metadata.get("ss_tag_frequency", "{}"))
        return {
            str(folder): {str(tag): int(count) for tag, count in counts.items()}
            for folder, counts in table.items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return {}
