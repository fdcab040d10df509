"""Reads an adapter file's metadata for a person: training, trigger words, base model. No torch.

All of it is a stranger's text, so control characters are removed and long texts are cut. Keys: `ss_*` of
sd-scripts, `modelspec.*` of ModelSpec 1.0.1, and those that the tools here write.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

from lora.formats.names.family import BASES, FILES

MAX_TEXT = 300
"""Characters of one fact."""

MAX_WORD, MAX_WORDS = 100, 50
"""Characters of a trigger word, and how many words are listed."""

MAX_JSON = 20_000_000
"""Characters of a field that is parsed as JSON."""


def clean(text: object, limit: int = MAX_TEXT) -> str:
    """Text that is safe for a terminal: one line, no control characters, at most `limit` characters."""
    words = " ".join(str(text)[: 4 * limit].split())
    plain = "".join(letter if letter.isprintable() else "?" for letter in words)
    return plain if len(plain) <= limit else f"{plain[: limit - 1]}…"


TRAINING: Mapping[str, str] = {
    "modelspec.title": "title",
    "ss_output_name": "output name",
    "modelspec.author": "author",
    "modelspec.date": "date",
    "modelspec.description": "description",
    "modelspec.license": "license",
    "modelspec.usage_hint": "usage hint",
    "modelspec.tags": "tags",
    "ss_training_comment": "comment",
    "ss_sd_model_name": "base model",
    "ss_network_module": "network",
    "ss_network_dim": "network rank",
    "ss_network_alpha": "network alpha",
    "ss_network_args": "network arguments",
    "ss_resolution": "resolution",
    "modelspec.resolution": "resolution (modelspec)",
    "modelspec.prediction_type": "prediction type",
    "ss_clip_skip": "clip skip",
    "ss_steps": "steps",
    "ss_max_train_steps": "steps planned",
    "ss_epoch": "epoch",
    "ss_num_epochs": "epochs planned",
    "ss_learning_rate": "learning rate",
    "ss_unet_lr": "learning rate (unet)",
    "ss_text_encoder_lr": "learning rate (text encoders)",
    "ss_lr_scheduler": "learning rate schedule",
    "ss_optimizer": "optimizer",
    "ss_total_batch_size": "batch size",
    "ss_batch_size_per_device": "batch size per device",
    "ss_num_train_images": "training images",
    "ss_num_reg_images": "regularisation images",
    "ss_noise_offset": "noise offset",
    "ss_min_snr_gamma": "min SNR gamma",
    "ss_mixed_precision": "mixed precision",
    "ss_seed": "seed",
    "ot_branch": "OneTrainer branch",
    "modelspec.merged_from": "merged from (modelspec)",
    "merged_from": "merged from",
    "extracted_from": "extracted from",
}
"""Key of the metadata -> its label for a person."""

EMPTY = ("", "None", "null", "{}", "[]")


def training_facts(metadata: Mapping[str, str]) -> dict[str, str]:
    """What the metadata says of the adapter's training: label -> text."""
    facts = {
        label: clean(metadata[key])
        for key, label in TRAINING.items()
        if metadata.get(key, "").strip() not in EMPTY
    }
    if folders := _folders(metadata):
        facts["datasets"] = folders
    return facts


def _folders(metadata: Mapping[str, str]) -> str:
    """kohya's folders of pictures: `name (images x repeats)`."""
    shown = []
    for name, fields in json_or_empty(metadata.get("ss_dataset_dirs"), dict).items():
        counts = fields if isinstance(fields, Mapping) else {}
        images, repeats = counts.get("img_count"), counts.get("n_repeats")
        counted = isinstance(images, int) and isinstance(repeats, int)
        shown.append(f"{name} ({images} images x {repeats})" if counted else str(name))
    return clean(", ".join(shown))


def word_counts(metadata: Mapping[str, str]) -> dict[str, int]:
    """Word -> how often the captions had it (kohya's `ss_tag_frequency`), the most frequent first.

    The phrase in `modelspec.trigger_phrase` comes before all, with 0 if no caption had it.
    """
    counts: Counter[str] = Counter()
    for tags in json_or_empty(metadata.get("ss_tag_frequency"), dict).values():
        for tag, count in (tags if isinstance(tags, Mapping) else {}).items():
            if isinstance(count, int) and 0 < count < 1 << 53 and (word := clean(tag, MAX_WORD)):
                counts[word] += count
    phrase = clean(metadata.get("modelspec.trigger_phrase", ""), MAX_WORD)
    first = {phrase: counts[phrase]} if phrase else {}
    return {**first, **dict(counts.most_common(MAX_WORDS))}


def named_bases(metadata: Mapping[str, str], config: str | None) -> dict[str, str]:
    """Field -> the base model that it names."""
    fields: dict[str, Any] = {**json_or_empty(config, dict), **metadata}
    return {name: clean(fields[name]) for name in (*BASES, *FILES) if fields.get(name)}


Parsed = TypeVar("Parsed", dict[str, Any], list[Any])


def json_or_empty(text: str | None, kind: type[Parsed]) -> Parsed:
    """The JSON object (dict) or array (list) of a field; empty if the field holds something else."""
    try:
        value = json.loads(text) if text and len(text) <= MAX_JSON else None
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, kind) else kind()
