"""The base model and its tokenizer, from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lora.errors import CodedError
from text.chat import ChatTemplate, ChatTemplateFailed
from text.structured import Grammars

DEMO, DEMO_FOLDER = "demo", Path(__file__).parent.parent / "demo" / "text" / "model"

FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
)
"""What is needed of a repo."""

COMPONENT = "model"
"""The model's name as a component of `lora.engine`."""

QUANTISATIONS = ("", "nf4", "int8")

DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a model's generation_config.json may say of sampling, for requests that do not."""


class ModelUnusable(CodedError):
    """The base model cannot be loaded or served."""

    code = "MODEL_UNUSABLE"


@dataclass(frozen=True)
class Wanted:
    """Which base to load, and how."""

    name: str = DEMO
    """What errors call it; a folder's path stands for its name."""
    folder: Path = DEMO_FOLDER
    tokenizer: Path | None = None
    """Another folder for the tokenizer."""
    device: str = "auto"
    dtype: str = "auto"
    """`auto`: the model's own on a GPU, float32 on a CPU."""
    quantisation: str = ""
    """`nf4` (with double quantisation), `int8`, or empty for none."""
    max_memory_gb: float = 0.0
    """The most that the weights may take on the device; 0 for no limit."""
    context: int = 0
    """The most tokens of a prompt and its text; 0 for what the model has."""
    template: str = ""
    """A chat template in place of the model's own: its text, or a file."""


@dataclass(frozen=True, eq=False)
class TextModel:
    """A base model that is loaded, its tokenizer, and what they say of themselves."""

    name: str
    model: nn.Module
    tokenizer: Any
    ends: frozenset[int]
    """The tokens that end a text."""
    context: int
    """The most tokens of a prompt and its text."""
    defaults: Mapping[str, float]
    template: str | None
    """The chat template's text; None if the model has none."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    @property
    def vocabulary(self) -> int:
        """How many tokens the model tells apart."""
        return int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]

    @cached_property
    def chat(self) -> ChatTemplate:
        """The chat template. Raises: ChatTemplateFailed if there is none, or it is broken."""
        if not self.template:
            raise ChatTemplateFailed(
                f"{self.name} has no chat template", "Send a prompt, or set CUSTOM_CHAT_TEMPLATE."
            )
        return self.with_template(self.template)

    @cached_property
    def grammars(self) -> Grammars:
        """Makes grammars over its tokens. Raises: SchemaUnsupported."""
        return Grammars(self.tokenizer, self.ends)

    def with_template(self, source: str) -> ChatTemplate:
        """A template with this tokenizer's special tokens. Raises: ChatTemplateFailed."""
        special = {
            name: token
            for name, token in self.tokenizer.special_tokens_map.items()
            if isinstance(token, str)
        }
        return ChatTemplate(source, special)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """The tokens of a prompt. `special`: with those that the tokenizer puts before each text."""
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=special)
        return tokens


def load_model(wanted: Wanted) -> TextModel:
    """Loads the base. Raises: ModelUnusable, with a sentence that says what is missing."""
    folder, words = wanted.folder, wanted.tokenizer or wanted.folder
    device = torch.device(_device(wanted.device))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(words, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, attn_implementation="sdpa", **_how(wanted, device)
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelUnusable(f"{wanted.name} cannot be loaded ({_first_line(error)})") from error
    model = model.eval().requires_grad_(False)
    if not wanted.quantisation and next(model.parameters()).device != device:
        model = model.to(device)
    return describe(wanted.name, model, tokenizer, config, wanted)


def load_shape(name: str, folder: Path) -> nn.Module:
    """The model's modules without their numbers: what adapters can change. Raises: ModelUnusable."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelUnusable(f"{name} cannot be read ({_first_line(error)})") from error
    return model


def describe(
    name: str, model: nn.Module, tokenizer: Any, config: Any, wanted: Wanted = Wanted()
) -> TextModel:
    """What a loaded model is. Raises: ModelUnusable if rows of different lengths cannot share its batch."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if strange := kinds - {"full_attention", "sliding_attention"}:
        raise ModelUnusable(f"{name} has layers of a kind that is not served ({min(strange)})")
    limits = [wanted.context, getattr(text, "max_position_embeddings", 0) or 0]
    if "sliding_attention" in kinds or (not kinds and getattr(text, "use_sliding_window", True)):
        # within its window a sliding layer sees all that a full one does
        limits.append(getattr(text, "sliding_window", 0) or 0)
    known = [limit for limit in limits if limit]
    generation = getattr(model, "generation_config", None) or GenerationConfig()
    ends = {tokenizer.eos_token_id} | _numbers(generation.eos_token_id)
    own = {
        rule: float(value)
        for rule in DEFAULTS
        if (value := getattr(generation, rule, None)) is not None and _differs(rule, value)
    }
    return TextModel(
        name=Path(name).name if Path(name).is_dir() else name,
        model=model,
        tokenizer=tokenizer,
        ends=frozenset(end for end in ends if end is not None),
        context=min(known) if known else 2048,
        defaults=own if getattr(generation, "do_sample", False) else {},
        template=_template(wanted.template, tokenizer),
    )


def _device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _how(wanted: Wanted, device: torch.device) -> dict[str, Any]:
    """How the weights are loaded. Raises: ValueError."""
    dtype: Any = wanted.dtype
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    how: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if wanted.max_memory_gb:
        place = 0 if device.type == "cuda" else "cpu"
        how |= {
            "device_map": "auto",
            "max_memory": {place: f"{wanted.max_memory_gb}GB", "cpu": "1000GB"},
        }
    if wanted.quantisation:
        from transformers import BitsAndBytesConfig

        compute = torch.float32 if device.type == "cpu" else torch.bfloat16
        packed = (
            BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=compute,
            )
            if wanted.quantisation == "nf4"
            else BitsAndBytesConfig(load_in_8bit=True)
        )
        how = {"device_map": {"": str(device)}, **how, "quantization_config": packed}
    return how


def _template(given: str, tokenizer: Any) -> str | None:
    """The template's text: the given one's, else the tokenizer's own (`default`, where it has several)."""
    if given:
        path = Path(given)
        short = len(given) < 1000 and "\n" not in given
        return path.read_text() if short and path.is_file() else given
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def _numbers(value: Any) -> set[int]:
    return set(value) if isinstance(value, list) else set() if value is None else {value}


def _differs(rule: str, value: Any) -> bool:
    """Whether a value is not transformers' default; before 5.0 that was written out, too."""
    usual = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 50,
        "repetition_penalty": 1.0,
        "min_p": None,
    }
    return bool(value != usual[rule])


def _first_line(error: BaseException) -> str:
    """What a library says, without the paths of this machine."""
    words = (str(error).strip() or type(error).__name__).splitlines()[0].split()
    return " ".join(word for word in words if "/" not in word or "huggingface.co" in word)[:300]
