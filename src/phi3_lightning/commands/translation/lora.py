"""What each key of LoraConfig comes to here."""

from typing import Any, Final

from phi3_lightning.commands.translation.rules import SAME, Equal, Rule, alone, as_it_is, whole
from phi3_lightning.config import PHI3_FUSED_LAYERS, REFUSED_STARTS

_NO_BASE_WRITE = "it changes base weights, or how they are read, and these stay as they are"
_NOT_OFFERED = "PEFT has it, and it is not offered here; leave it out"


def _targets(value: Any) -> Any:
    names = [value] if isinstance(value, str) else list(value)
    slices = {name for name in names if any(name in parts for parts in PHI3_FUSED_LAYERS.values())}
    complete = all(slices >= set(parts) or not slices & set(parts) for parts in PHI3_FUSED_LAYERS.values())
    written = as_it_is(value)
    if not slices or complete:
        return written
    settings = {"model.lora.target_modules": written, "model.lora.backend": "loralib"}
    return Equal(
        settings, f"{', '.join(sorted(slices))} are slices of fused layers, which backend: loralib adapts one by one"
    )


def _start(value: Any) -> Any:
    for name, reason in REFUSED_STARTS.items():
        if str(value).startswith(name):
            return Equal(note=f"{value!r} cannot be used: {reason}; the start is true")
    return value


def _bias(value: Any) -> Equal:
    return SAME if value == "none" else Equal(note="no layer of a Phi3ForCausalLM has a bias to train")


def _task(value: Any) -> Equal:
    return SAME if value == "CAUSAL_LM" else Equal(note="CAUSAL_LM is what is trained here")


def _peft_type(value: Any) -> Equal:
    return SAME if value == "LORA" else Equal(note=f"{value!r} is not offered: adapters are LoRA, with rsLoRA and DoRA")


RULES: Final[dict[str, Rule]] = {
    **{
        key: alone(f"model.lora.{key}", as_it_is)
        for key in (
            "alpha_pattern", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save",
            "rank_pattern", "use_dora", "use_rslora",
        )
    },
    "base_model_name_or_path": alone("model.base", as_it_is),
    "bias": alone("model.lora.bias", _bias),
    "init_lora_weights": alone("model.lora.init_lora_weights", _start),
    "lora_alpha": alone("model.lora.lora_alpha", float),
    "lora_dropout": alone("model.lora.lora_dropout", float),
    "peft_type": alone("model.lora", _peft_type),
    "r": alone("model.lora.r", whole),
    "revision": alone("model.revision", as_it_is),
    "target_modules": alone("model.lora.target_modules", _targets),
    "task_type": alone("model.lora.task_type", _task),
}  # fmt: skip
"""Keys that have an equal."""

NOTES: Final = {
    "alora_invocation_tokens": _NOT_OFFERED,
    "arrow_config": _NOT_OFFERED,
    "auto_mapping": "written by PEFT for classes of others",
    "corda_config": _NO_BASE_WRITE,
    "ensure_weight_tying": _NOT_OFFERED,
    "eva_config": "init_lora_weights: eva has PEFT's settings, with rho 1, and each layer keeps its rank",
    "fan_in_fan_out": "for weights of shape (in, out), as GPT-2 has them; Phi-3 has none",
    "inference_mode": "fit trains, the other commands do not",
    "kasa_config": _NOT_OFFERED,
    "layer_replication": "it adds layers to the base, which stays as it is",
    "loftq_config": _NO_BASE_WRITE,
    "lora_bias": _NOT_OFFERED,
    "lora_ga_config": _NO_BASE_WRITE,
    "megatron_config": _NOT_OFFERED,
    "megatron_core": _NOT_OFFERED,
    "monteclora_config": _NOT_OFFERED,
    "peft_version": "written by PEFT; nothing depends on it",
    "qalora_group_size": _NOT_OFFERED,
    "runtime_config": _NOT_OFFERED,
    "target_parameters": "for experts' weights, which Phi3ForCausalLM has none of",
    "trainable_token_indices": "single tokens are not trained; modules_to_save: [embed_tokens] trains all of them",
    "use_bdlora": _NOT_OFFERED,
    "use_qalora": _NOT_OFFERED,
    "velora_config": _NOT_OFFERED,
}
"""Keys that have none, and why."""
