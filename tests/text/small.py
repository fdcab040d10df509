"""For tests of text: a tiny Llama with random weights, adapters that PEFT makes for it, and PEFT's words."""

from __future__ import annotations

import copy
import random
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora.engine.engine import LoraEngine
from lora.formats.adapter import LoraFile
from lora.formats.opening import load_file
from text.loading import COMPONENT, TextModel, describe

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCABULARY = 261
END = 260

KINDS: Mapping[str, Any] = {
    "plain": lambda: LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS)),
    "other": lambda: LoraConfig(r=8, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
    "ranked": lambda: LoraConfig(
        r=4, lora_alpha=8, target_modules=list(TARGETS), rank_pattern={"q_proj": 2}, use_rslora=True
    ),
    "head": lambda: LoraConfig(r=3, lora_alpha=6, target_modules=["down_proj", "lm_head"]),
    "dora": lambda: LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), use_dora=True),
    "bias": lambda: LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], lora_bias=True),
    "saved": lambda: LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["norm"]
    ),
    "loha": lambda: LoHaConfig(r=4, alpha=8, target_modules=["q_proj", "up_proj"]),
}
"""Adapter -> how PEFT makes it. `bias` needs a base whose q_proj has one."""

SHARED, ALONE = ("plain", "other", "ranked", "head"), ("dora", "saved", "loha")


@cache
def base() -> LlamaForCausalLM:
    """Weights so large that greedy choices differ from row to row. Take a copy to change it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    return model


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; 256 to 259 mark roles, 260 ends a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    marks = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    made.add_special_tokens([*marks, "<|end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        additional_special_tokens=marks,
        eos_token="<|end|>",
        chat_template=(
            "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        ),
    )


def text_model(model: LlamaForCausalLM | None = None) -> TextModel:
    own = model if model is not None else copy.deepcopy(base())
    return describe("small", own, tokenizer(), own.config)


@cache
def folder(kind: str, seed: int = 0) -> Path:
    """What PEFT saves of an adapter with random weights."""
    torch.manual_seed(seed + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base()), KINDS[kind]())
        for name, parameter in model.named_parameters():
            if "original_module" in name or not parameter.requires_grad:
                continue
            if "magnitude" in name or "modules_to_save" in name:
                parameter.data.mul_(1 + 0.3 * torch.rand_like(parameter))
            else:
                parameter.data.normal_(0, 0.3 if "lora_A" in name else 0.2)
        path = Path(tempfile.mkdtemp(prefix=f"peft-{kind}-"))
        model.save_pretrained(path, save_embedding_layers=False)
    return path


def adapter(engine: LoraEngine, kind: str, seed: int = 0) -> LoraFile:
    return load_file(folder(kind, seed), engine.key_map)


def engine_of(text: TextModel) -> LoraEngine:
    return LoraEngine({COMPONENT: text.model})


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    r = random.Random(seed)
    return [[r.randrange(256) for _ in range(r.randrange(2, 40))] for _ in range(count)]


@torch.no_grad()
def generated(model: Any, prompt: list[int], new: int) -> list[int]:
    """What transformers generates greedily from a prompt alone."""
    given = torch.tensor([prompt])
    out = model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=END,
    )
    return out[0, len(prompt) :].tolist()


@cache
def peft(kind: str | None, seed: int = 0) -> Any:
    """The base as PEFT serves it with one adapter; without one, plain."""
    if kind is None:
        return base()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(base()), str(folder(kind, seed))).eval()
