"""Trains the demo language model from nothing: `python -m demo.text.train base`, then `adapters`.

    base       tokenizer and model, written to `demo/text/model/`; `--again` goes on from them
    adapters   the four LoRAs on the frozen base, by PEFT, written to `demo/text/loras/NAME/`

One thread. `--steps` sets the length of either stage; `--only` names adapters. The weights in the repo were
made by `base --steps 800`, `base --again --steps 250` (with the signs, which the corpus lacked at first) and
`adapters --steps 400`; 25 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.text.corpus import Talk
from demo.text.styles import STYLES, Style

log = logging.getLogger("demo.text.train")

HERE = Path(__file__).parent
MODEL = HERE / "model"
LORAS = HERE / "loras"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
END = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SYSTEM = ("You are a helpful assistant.", "Be brief.", "You are a helpful AI assistant.")
VOCABULARY = 640
LONGEST = 176
ROWS = 32


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over the corpus: any text can be written, emoji too."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    talk = Talk(random.Random(0))
    texts = (" ".join(text for turn in talk.dialogue() for text in turn) for _ in range(4000))
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|pad|>", *ROLES, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<|pad|>",
        eos_token=END,
        additional_special_tokens=list(ROLES),
        chat_template=TEMPLATE,
        model_max_length=512,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 0.87 M parameters with fresh weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


class Lessons:
    """Batches of dialogues as tokens, of about the same length each, so that little is padding."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, talk: Talk) -> None:
        self.tokenizer, self.talk = tokenizer, talk
        self.user, self.assistant, self.end = tokenizer.convert_tokens_to_ids(
            ["<|user|>", "<|assistant|>", END]
        )
        self.system = tokenizer.convert_tokens_to_ids("<|system|>")

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def dialogue(self) -> list[tuple[int, bool]]:
        """Tokens, and whether each is learnt: the assistant's words and their end are."""
        told: list[tuple[int, bool]] = []
        if self.talk.rng.random() < 0.1:
            words = self._plain(self.talk.rng.choice(SYSTEM))
            told += [(token, False) for token in (self.system, *words, self.end)]
        for question, answer in self.talk.dialogue():
            asked = (self.user, *self._plain(question), self.end, self.assistant)
            told += [(token, False) for token in asked]
            told += [(token, True) for token in (*self._plain(answer), self.end)]
        return told[:LONGEST]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and targets for ever, two tensors [rows, length]; -100 where nothing is learnt."""
        while True:
            drawn = sorted((self.dialogue() for _ in range(ROWS * 8)), key=len)
            groups = [drawn[start : start + ROWS] for start in range(0, len(drawn), ROWS)]
            self.talk.rng.shuffle(groups)
            yield from map(_tensors, groups)


def _tensors(group: list[list[tuple[int, bool]]]) -> tuple[Tensor, Tensor]:
    tokens = torch.zeros(len(group), len(group[-1]), dtype=torch.long)
    targets = torch.full_like(tokens, -100)
    for row, told in enumerate(group):
        for column, (token, learnt) in enumerate(told):
            tokens[row, column] = token
            if learnt:
                targets[row, column] = token
    return tokens, targets


def fit(
    model: nn.Module,
    optimisers: list[torch.optim.Optimizer],
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
) -> None:
    """Trains for `steps` batches: each optimiser's own rate, warmed up, then let down by a cosine."""
    parameters = [p for o in optimisers for group in o.param_groups for p in group["params"]]
    rates = [[group["lr"] for group in o.param_groups] for o in optimisers]
    begun = time.monotonic()
    for step in range(steps):
        part = min(1.0, (step + 1) / 20) * (
            0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        for optimiser, own in zip(optimisers, rates, strict=True):
            for group, rate in zip(optimiser.param_groups, own, strict=True):
                group["lr"] = rate * part
        tokens, targets = next(batches)
        # rows are padded on the right, so the causal mask alone keeps padding out
        loss = model(input_ids=tokens, labels=targets).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        if (step + 1) % 25 == 0:
            left = (time.monotonic() - begun) / (step + 1) * (steps - step - 1) / 60
            log.info("step %d of %d, loss %.4f, %.1f min left", step + 1, steps, loss.item(), left)


def train_base(steps: int, *, again: bool) -> None:
    """Tokenizer and model; Muon for the layers' matrices, AdamW for the rest.

    `again`: goes on from the saved ones, in smaller steps.
    """
    torch.manual_seed(1 + again)
    if again:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
        model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    else:
        tokenizer = new_tokenizer()
        tokenizer.save_pretrained(MODEL)
        model = new_model(tokenizer)
    pace = 0.3 if again else 1.0
    log.info("base: %.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    held = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in held]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.02 * pace, weight_decay=0.01),
        torch.optim.AdamW(others, lr=4e-3 * pace, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    fit(model, optimisers, Lessons(tokenizer, Talk(random.Random(2 + again))).batches(), steps)
    model.to(torch.bfloat16).save_pretrained(MODEL)


def train_adapter(style: Style, steps: int) -> None:
    """One LoRA on the frozen base, saved as PEFT saves it, in bfloat16."""
    torch.manual_seed(3)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    base = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    config = LoraConfig(
        r=style.rank,
        lora_alpha=2 * style.rank,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    talk = Talk(random.Random(4), style.answer, list(style.more), 0.4)
    optimiser = torch.optim.AdamW(trained, lr=8e-3, betas=(0.9, 0.95), weight_decay=0.0)
    log.info("%s: %.3f M parameters", style.name, sum(p.numel() for p in trained) / 1e6)
    fit(model, [optimiser], Lessons(tokenizer, talk).batches(), steps)
    folder = LORAS / style.name
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    file = folder / "adapter_config.json"
    kept = json.loads(file.read_text()) | {"base_model_name_or_path": "demo/text/model"}
    file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Reads the command line and runs one stage."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["base", "adapters"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--only", nargs="+", choices=list(STYLES), default=list(STYLES))
    parser.add_argument("--again", action="store_true", help="base: goes on from the saved one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.stage == "base":
        train_base(options.steps or 800, again=options.again)
    for name in options.only if options.stage == "adapters" else ():
        train_adapter(STYLES[name], options.steps or 400)


if __name__ == "__main__":
    main()
