"""``adapter_config.json`` of PEFT, of which every key is taken, changes no output, or is refused by name."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Final

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig

from phi3_lightning.config import LoRA
from phi3_lightning.config.checks import section
from phi3_lightning.errors import CheckpointError, ConfigError
from phi3_lightning.hub import refusal, split_revision

NAME = "adapter_config.json"

TAKEN: Final = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "use_rslora", "use_dora", "modules_to_save",
)  # fmt: skip
"""Keys that ``model.lora`` has as well, with the same meaning."""

HARMLESS: Final = frozenset((
    "base_model_name_or_path", "revision",  # the base, which is compared by both
    "auto_mapping", "inference_mode", "peft_version", "runtime_config",  # how PEFT loads
    "lora_dropout", "eva_config", "merge_weights",  # how it is trained
    "bias", "fan_in_fan_out",  # no layer of a Phi3ForCausalLM has a bias, or weights of shape (in, out)
    "corda_config", "loftq_config", "lora_ga_config", "megatron_core", "qalora_group_size",  # of what is refused below
    "lora_dtype", "lorap_emb_lr", "lorap_lr_ratio",  # ms-swift: how it is trained
))  # fmt: skip
"""Keys that change no output of a trained adapter, whatever their value."""

REFUSED: Final = {
    "alora_invocation_tokens": "the adapter acts on the tokens after an invocation alone",
    "arrow_config": "it routes between several adapters",
    "enable_lora": "of a PEFT before 0.3, whose fused layers have tensors of other shapes",
    "ensure_weight_tying": "it ties the adapters of embed_tokens and lm_head; where neither is adapted, write false",
    "kasa_config": "it cuts singular values off the base weights",
    "layer_replication": "it adds layers to the base",
    "lora_bias": "it adds a bias to each LoRA delta",
    "megatron_config": "it is for Megatron's layers",
    "monteclora_config": "it draws the LoRA delta at random",
    "target_parameters": "it adapts parameters, and layers are adapted here",
    "trainable_token_indices": "it replaces rows of the embedding",
    "use_bdlora": "its matrices are block-diagonal",
    "use_qalora": "it adds up groups of inputs",
    "velora_config": "it brings tensors of its own for the backward pass",
}
"""Keys that change what is computed, and how; off, they change nothing."""

CHECKED: Final = ("peft_type", "task_type", "init_lora_weights")
"""Keys of which some values are refused."""

STARTS: Final = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Values of ``init_lora_weights`` that leave the base as it is."""


@dataclass(frozen=True)
class AdapterConfig:
    """The keys of ``adapter_config.json`` that are used."""

    lora: Mapping[str, Any]
    """The keys of ``model.lora`` that describe the adapter, with PEFT's defaults where the file has none."""
    base: str | None
    """Name of the base model, or a path on the machine that trained it."""
    revision: str | None
    """Branch, tag or commit of the base."""

    def to_peft(self) -> LoraConfig:
        """Return PEFT's configuration with these keys."""
        return LoraConfig(**self.lora, base_model_name_or_path=self.base, revision=self.revision)


def is_adapter(folder: Path) -> bool:
    """Whether a folder, or a folder in it, holds an adapter in PEFT's format."""
    return (folder / NAME).is_file() or (folder.is_dir() and any(folder.glob(f"*/{NAME}")))


def read(source: str, option: str) -> AdapterConfig:
    """Read ``adapter_config.json``.

    Raises:
        CheckpointError: If it cannot be read, or describes another adapter than LoRA as it is computed here.
    """
    content = _content(source, option)
    where = f"{option}: {source}: {NAME}"
    _check_kind(content, where)
    for key, value in content.items():
        _check_key(key, value, where)
    lora = {key: content[key] for key in TAKEN if not _is_off(content.get(key))}
    if isinstance(lora.get("layers_pattern"), list) and len(lora["layers_pattern"]) == 1:
        (lora["layers_pattern"],) = lora["layers_pattern"]
    lora = {"r": LoraConfig.r, "lora_alpha": LoraConfig.lora_alpha} | lora
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(content.get(key), str | None):
            raise CheckpointError(f"{where}: {key}: {content[key]!r} is not text")
    config = AdapterConfig(lora, content.get("base_model_name_or_path") or None, content.get("revision"))
    try:
        section(LoRA, lora)
        config.to_peft()
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {str(error).removeprefix('model.lora.')}") from None
    return config


def _content(source: str, option: str) -> dict[str, Any]:
    name, revision = split_revision(option, source)
    try:
        file = Path(source) / NAME if Path(source).is_dir() else Path(hf_hub_download(name, NAME, revision=revision))
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        inside = sorted(path.parent for path in Path(source).glob(f"*/{NAME}")) if Path(source).is_dir() else []
        if inside:
            raise CheckpointError(
                f"{option}: {source} holds adapters in folders of their own; give one: {', '.join(map(str, inside))}"
            ) from None
        why = refusal(error, name, revision) or error
        raise CheckpointError(
            f"{option}: no adapter in PEFT's format in {source!r}: give a folder or hub id with {NAME} and "
            f"adapter_model.safetensors, a loralib file .pt, or a checkpoint .ckpt ({why})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{option}: {source}: {NAME} holds a {type(content).__name__} and no keys")
    return content


def _check_kind(content: Mapping[str, Any], where: str) -> None:
    kind, task, start = (content.get(key) for key in CHECKED)
    if kind != "LORA":
        raise CheckpointError(f"{where}: peft_type: {kind!r} is not read; adapters are LORA, with rsLoRA and DoRA")
    if task not in (None, "CAUSAL_LM"):
        raise CheckpointError(
            f"{where}: task_type: {task!r} is another kind of model; a CAUSAL_LM is adapted here, and where it is one "
            "all the same, write that"
        )
    if start not in STARTS:
        raise CheckpointError(
            f"{where}: init_lora_weights: {start!r} changes the base weights, which stay as they are here. Convert the "
            "adapter where it was trained: save_pretrained(FOLDER, path_initial_model_for_weight_conversion=THE "
            "UNTRAINED ADAPTER) of PEFT writes one for the base as it is"
        )


def _check_key(key: str, value: object, where: str) -> None:
    if key in TAKEN or key in HARMLESS or key in CHECKED or value is None or value is False:
        return
    if key in REFUSED:
        raise CheckpointError(f"{where}: {key}: {value!r} cannot be used: {REFUSED[key]}, which is not done here")
    # the installed PEFT may know more keys than are listed here
    defaults = {field.name: field.default for field in fields(LoraConfig) if field.default is not MISSING}
    if not _is_off(value) and value != defaults.get(key):
        raise CheckpointError(
            f"{where}: {key}: {value!r} is not known here, and may change what the adapter does; where it is what PEFT "
            "writes by itself, take the line out"
        )


def _is_off(value: object) -> bool:
    """Whether a value is that of a key that was not set."""
    return value is None or value is False or value in ([], {}, "")
