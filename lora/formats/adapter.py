"""An adapter file -> LoraFile: what the engine applies, and every other tensor with its reason."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lora.formats.contents import Layer, UnusedKey, read_contents, refuse_misfits
from lora.formats.embeddings import TokenEmbedding, read_embedding
from lora.formats.header import read_header
from lora.formats.names.keys import KeyMap


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A parsed adapter, bound to the modules of one pipeline, its tensors still on the CPU.

    The tensors of its layers, its embeddings and its unused keys together are the whole file.
    """

    sha256: str
    layers: tuple[Layer, ...]
    unused: tuple[UnusedKey, ...]
    metadata: Mapping[str, str]
    embeddings: tuple[TokenEmbedding, ...] = ()
    identity: str = ""
    """A hash of what determines the effect: the file's bytes, and its config's if there is one."""
    size: int = 0
    """How many bytes its tensors take."""
    scaled: bool = True
    """Whether the file or its config contains an alpha."""

    @cached_property
    def algorithms(self) -> tuple[str, ...]:
        """The algorithms that occur, the most frequent first."""
        names = Counter(layer.algorithm.name for layer in self.layers)
        names["textual inversion"] = len(self.embeddings)
        return tuple(name for name, count in names.most_common() if count)

    @cached_property
    def rank(self) -> int | None:
        """The most frequent rank of its layers; None if none has one."""
        ranks = Counter(layer.algorithm.rank for layer in self.layers if layer.algorithm.rank)
        return ranks.most_common(1)[0][0] if ranks else None

    @cached_property
    def modules(self) -> int:
        """How many modules it changes."""
        return len({layer.target for layer in self.layers})

    @property
    def keys(self) -> int:
        """How many tensors are used."""
        return sum(layer.keys for layer in self.layers) + len(self.embeddings)


def load(
    path: Path, key_map: KeyMap, sha256: str, *, config: str | None = None, mapped: bool = False
) -> LoraFile:
    """Reads a .safetensors adapter and binds it to the pipeline that `key_map` describes.

    `config` is the text of a PEFT adapter's adapter_config.json; `mapped`: see `read_runs`. No weight of the
    pipeline is touched. Raises: LoraCorrupt if the file is not whole, or holds NaN or infinity;
    LoraIncompatible if it is for another model, or the larger part of it has no place in this pipeline;
    LoraUnsupported if none of it can be applied, or it holds more than one LoRA.
    """
    header = read_header(path)
    contents = read_contents(path, header, key_map, config=config, mapped=mapped)
    unused, embeddings = contents.unused, list[TokenEmbedding]()
    for key, vectors in contents.words.items():
        embedding = read_embedding(key, vectors, key_map)
        if isinstance(embedding, str):
            unused.append(UnusedKey(key, embedding))
        else:
            embeddings.append(embedding)
    layers = tuple(layer for module in contents.modules.values() for layer in module.layers)
    refuse_misfits(contents, used=bool(layers or embeddings))
    identity = hashlib.sha256(config.encode()).hexdigest()[:16] if config is not None else ""
    return LoraFile(
        sha256,
        layers,
        tuple(unused),
        header.metadata,
        tuple(embeddings),
        f"{sha256}{identity}",
        sum(info.end - info.start for info in header.tensors.values()),
        bool(contents.alphas.configs) or any(key.endswith(".alpha") for key in header.tensors),
    )
