"""What the fields of PEFT's configs do to the result, and which values are implemented. No torch.

The fields of peft 0.21 and earlier. A field that is not in the tables is unknown: it must be empty or false.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora.errors import LoraUnsupported

READ = frozenset(
    {
        *("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
        *("coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms", "feedforward_modules"),
        *("peft_type", "base_model_name_or_path", "apply_GS", "init_r", "randlora_alpha"),
    }
)
"""They change the result, and are read."""

SHOWN = frozenset(
    {
        *("use_dora", "lora_bias", "bias", "modules_to_save", "trainable_token_indices"),
        *("use_effective_conv2d", "decompose_both", "decompose_factor", "block_share"),
        *("oft_block_size", "target_modules", "exclude_modules", "layers_to_transform"),
        *("layers_pattern", "fan_in_fan_out", "mini_r"),
        *("boft_block_size", "boft_block_num", "boft_n_butterfly_factor"),
        *("projection_prng_key", "save_projection", "sparse", "very_sparse"),
    }
)
"""They change the result, and the tensors show how."""

TRAINING = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode"),
        *("lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale"),
        *("init_weights", "init_ia3_weights", "megatron_config", "megatron_core"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
        *("boft_dropout", "miss_dropout", "target_r", "tinit", "tfinal", "deltaT", "total_step"),
        *("beta1", "beta2", "orth_reg_weight", "randlora_dropout"),
        *("velora_config", "qalora_group_size", "ensure_weight_tying"),
    }
)
"""They matter in training, or beside another field that is in the tables, and do not change the result."""

INITIAL = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""The values of `init_lora_weights` that leave the base weight as it is. PiSSA, OLoRA, CorDA, LoftQ and
LoRA-GA take the adapter's first value off it, and the file lacks that value."""

TYPES = (
    *(None, "LORA", "LOHA", "LOKR", "OFT", "IA3", "LN_TUNING", "BOFT", "HRA", "MISS", "ADALORA"),
    "RANDLORA",
)
"""The values of `peft_type` that are implemented."""

CONVERT = "Merge it with PEFT (merge_and_unload), and extract a LoRA from the merged model."
RESIDUAL = (
    "Save it in PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it."
)


def refuse_unread(fields: Mapping[str, Any]) -> None:
    """Raises: LoraUnsupported, with the field's name, if the config says what is not implemented."""
    kind = fields.get("peft_type")
    if kind not in TYPES:
        raise LoraUnsupported(f"PEFT's {_shown(kind)} is not read", CONVERT)
    initial = fields.get("init_lora_weights")
    if initial not in INITIAL:
        raise LoraUnsupported(
            f"the PEFT config says init_lora_weights = {_shown(initial)}: the adapter belongs to a base "
            "weight that its training changed",
            RESIDUAL,
        )
    known = READ | SHOWN | TRAINING | {"init_lora_weights"}
    for name in fields.keys() - known:
        if fields[name]:
            raise LoraUnsupported(
                f"the PEFT config says {_shown(name)} = {_shown(fields[name])}, which is not read",
                CONVERT,
            )


def _shown(value: object) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in str(value)[:60])
