"""The settings of a worker for text: what worker-vllm calls them, and the LoRA settings of every worker."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from settings import Settings, SettingsError, _setting, split_list


# fmt: off
@dataclass(frozen=True)
class TextSettings(Settings):
    """A text worker's settings: `Settings` with other names, and more. docs/text.md has the table."""

    model: str = _setting("MODEL_NAME", "demo",
        "Base model: a Hugging Face repo, a folder, or `demo` for the embedded one")
    dtype: str = _setting("DTYPE", "auto",
        "Precision of the weights; `auto` is the model's own on a GPU and float32 on a CPU",
        options=("auto", "half", "float16", "bfloat16", "float", "float32"))
    concurrency: int = _setting("MAX_CONCURRENCY", 30, "Jobs that the worker takes at once", minimum=1)
    deadline: float = _setting("REQUEST_TIMEOUT", 3600.0,
        "Seconds after which a request ends with DEADLINE_EXCEEDED; 0 for no limit but the job's own "
        "executionTimeout", minimum=0)
    other_bases: str = _setting("WORKER_BASES", "",
        "Other base models that a request's `model` may name, separated by commas: repos or folders. One "
        "is loaded at a time; another takes its place when the requests before have ended")
    revision: str = _setting("MODEL_REVISION", "", "Branch, tag or commit of the base model's repo")
    tokenizer: str = _setting("TOKENIZER_NAME", "",
        "Repo or folder of the tokenizer, where it is not the base model's")
    served_name: str = _setting("OPENAI_SERVED_MODEL_NAME_OVERRIDE", "",
        "What requests and answers call the base model, in place of its own name")
    chat_template: str = _setting("CUSTOM_CHAT_TEMPLATE", "",
        "A chat template in place of the model's own: its text, or a file")
    context: int = _setting("MAX_MODEL_LEN", 0,
        "Most tokens of a prompt and its text together; 0 for what the model has", minimum=0)
    quantisation: str = _setting("QUANTIZATION", "",
        "`nf4` (with double quantisation; `bitsandbytes` means the same) or `int8` packs the weights as "
        "they are loaded, by bitsandbytes", options=("", "nf4", "bitsandbytes", "int8"))
    max_memory_gb: float = _setting("MAX_MEMORY_GB", 0.0,
        "Most GB of weights on the GPU; the rest stays in the machine's memory; 0 for no limit", minimum=0)
    most_rows: int = _setting("MAX_NUM_SEQS", 16, "Texts that are written at once", minimum=1)
    engine: str = _setting("TEXT_ENGINE", "own",
        "`own`, or `vllm`: requests are handed to a vLLM server, with their LoRAs", options=("own", "vllm"))
    vllm_url: str = _setting("TEXT_VLLM_URL", "",
        "Address of the vLLM server, which must see LORA_CACHE_DIR under the same path; if it is empty, the "
        "worker starts one of its own")
    vllm_key: str = _setting("TEXT_VLLM_KEY", "", "API key of the vLLM server", secret=True, token=True)
    enable_lora: str = _setting("ENABLE_LORA", "", "Has no effect: LoRAs are always served")
    max_loras: str = _setting("MAX_LORAS", "",
        "Most LoRAs in a batch of a vLLM server that the worker starts (8); without effect otherwise")
    max_lora_rank: str = _setting("MAX_LORA_RANK", "",
        "Largest rank that the vLLM server takes (16); without effect otherwise")
    lora_modules: str = _setting("LORA_MODULES", "",
        'Adapters with names for `model`, as JSON: `[{"name": "pirate", "path": "user/repo"}]`',
        secret=True)
    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            _ = self.modules
        except ValueError as error:
            raise SettingsError(f"LORA_MODULES: {error}") from None
        if self.engine == "vllm":
            self._check_vllm()

    def _check_vllm(self) -> None:
        """Raises: SettingsError for what only our own engine does, or what is no number there."""
        for env, text in (("MAX_LORAS", self.max_loras), ("MAX_LORA_RANK", self.max_lora_rank)):
            if text and not (text.isascii() and text.isdecimal() and int(text) > 0):
                raise SettingsError(f"{env}: {text!r} is not a whole number of at least 1")
        if self.quantisation == "int8" or self.max_memory_gb:
            raise SettingsError("QUANTIZATION=int8 and MAX_MEMORY_GB do not go with TEXT_ENGINE=vllm")

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str],
        more_faults: Callable[[Any], Iterable[str]] = lambda settings: (),
    ) -> TextSettings:
        """As `Settings.from_env`; the names of an image worker's own settings are passed over."""
        own = {setting.metadata["env"] for setting in fields(cls)}
        images = {setting.metadata["env"] for setting in fields(Settings)} - own
        mine = {name: text for name, text in environ.items() if name not in images}
        return super().from_env(mine, more_faults)  # type: ignore[return-value]

    @property
    def weight_sources(self) -> tuple[str, ...]:
        """As `Settings.weight_sources`, without the demo, which is small."""
        return () if self.model == "demo" else (self.model,)

    @property
    def downloads(self) -> bool:
        """As `Settings.downloads`; `auto` does, as worker-vllm."""
        return self.weights in ("auto", "download")

    @property
    def model_revision(self) -> str | None:
        """As `Settings.model_revision`."""
        return self.revision or None

    @property
    def name(self) -> str:
        """What requests call the base model."""
        return self.served_name or ("demo-text" if self.model == "demo" else self.model)

    @property
    def bases(self) -> dict[str, str]:
        """Every base that may be served: what requests call it -> its source; the worker's own first."""
        return {self.name: self.model, **{one: one for one in split_list(self.other_bases)}}

    def base_of(self, model: str) -> str:
        """The source of the base that `model` means: that of `base` or `base:adapter`, else ours."""
        named = [name for name in self.bases if model == name or model.startswith(f"{name}:")]
        return self.bases[named[0]] if named else self.model

    def of_base(self, source: str) -> TextSettings:
        """The settings with another base, without what was said of ours alone."""
        if source == self.model:
            return self
        return replace(
            self, model=source, revision="", tokenizer="", served_name="", chat_template=""
        )

    @property
    def modules(self) -> dict[str, str]:
        """The adapters of LORA_MODULES: name -> source. Raises: ValueError."""
        text = self.lora_modules.strip()
        try:
            entries = json.loads(text) if text else []
            entries = [entries] if isinstance(entries, dict) else entries
            found = {str(entry["name"]): str(entry["path"]) for entry in entries}
        except (ValueError, TypeError, KeyError):
            raise ValueError('it is no JSON list of objects with "name" and "path"') from None
        return found
