"""Starting from an adapter that exists: PEFT's files, loralib's, or a checkpoint of this package."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from lightning.pytorch.utilities import rank_zero_info
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from phi3_lightning.adapters import convert, targets
from phi3_lightning.adapters.adapter import Adapter, PeftForm
from phi3_lightning.config import STRUCTURAL_LORA_KEYS, LoRA
from phi3_lightning.errors import CheckpointError

KEY = "model.lora.adapter"
WEIGHTS = "adapter_model.safetensors"


def load_into(adapter: Adapter, model: nn.Module, lora: LoRA, base: str | None) -> None:
    """Set a fresh adapter to the values of ``lora.adapter``.

    Args:
        adapter: The adapter.
        model: The model that carries it.
        lora: The section; its rank, scale and targets must be those of what is read.
        base: Name of the base model, if it has one.

    Raises:
        CheckpointError: If nothing can be read there, or it is another adapter or of another base.
    """
    source = str(lora.adapter)
    where = f"{KEY}: {source}"
    suffix = Path(source).suffix
    if suffix in (".ckpt", ".pt"):
        content = _read_torch(source)
        if suffix == ".ckpt":
            state = _of_checkpoint(content, {**asdict(lora), "slices": targets.partial(adapter.targets)})
        else:
            state = _of_loralib(content, lora, where)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        convert.check_tensors(state, trained, where)
        model.load_state_dict(state, strict=False)
    else:
        adapter.load_peft(_read_peft(source, base), where)
    rank_zero_info(f"adapter: starting from {source}")


def check_origin(lora: LoRA, fingerprint: str) -> None:
    """See that a checkpoint to start from was trained on the same base weights.

    Args:
        lora: The section.
        fingerprint: Hash of the base's weights, which are read after the adapter is attached where they are sharded.

    Raises:
        CheckpointError: If it was not.
    """
    if lora.adapter is None or Path(lora.adapter).suffix != ".ckpt":
        return
    identity = _identity(_read_torch(lora.adapter), lora.adapter)
    if identity["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{KEY}: {lora.adapter} belongs to another base ({identity['base'] or 'a local folder'}), or to this one "
            "in another dtype or quantization; an adapter in PEFT's format moves between those"
        )


def _read_torch(source: str) -> Mapping[str, Any]:
    if not Path(source).is_file():
        raise CheckpointError(f"{KEY}: there is no file {source}")
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is cut or foreign
        raise CheckpointError(
            f"{KEY}: {source} is no whole file of tensors and plain types ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{KEY}: {source} holds a {type(content).__name__} and no tensors by name")
    return content


def _identity(content: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    if "phi3_lightning" not in content:
        raise CheckpointError(f"{KEY}: {source} is no checkpoint of this package")
    return cast("Mapping[str, Any]", content["phi3_lightning"])


def _of_checkpoint(content: Mapping[str, Any], lora: dict[str, Any]) -> dict[str, Tensor]:
    source = lora["adapter"]
    identity = _identity(content, source)
    for key in (*STRUCTURAL_LORA_KEYS, "slices"):
        was = identity["lora"].get(key)
        if was != lora[key]:
            raise CheckpointError(
                f"{KEY}: {source} was trained with model.lora.{key}: {was}, and here it is {lora[key]}"
            )
    prefix = "model."
    return {n.removeprefix(prefix): tensor for n, tensor in content["state_dict"].items() if n.startswith(prefix)}


def _of_loralib(content: Mapping[str, Any], lora: LoRA, where: str) -> dict[str, Tensor]:
    if lora.backend != "loralib":
        raise CheckpointError(f"{where} is a file of loralib's; set model.lora.backend: loralib")
    return {name: tensor for name, tensor in content.items() if "lora_" in name}


def _read_peft(source: str, base: str | None) -> PeftForm:
    try:
        config = LoraConfig.from_pretrained(source)
        file = Path(source) / WEIGHTS if Path(source).is_dir() else Path(hf_hub_download(source, WEIGHTS))
        tensors = load_file(file)
    except (OSError, ValueError, SafetensorError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{KEY}: no adapter in PEFT's format in {source!r}: give a folder or hub id with adapter_config.json and "
            f"{WEIGHTS}, a loralib file .pt, or a checkpoint .ckpt ({error})"
        ) from error
    recorded = config.base_model_name_or_path
    if base and recorded and recorded != base and not Path(recorded).exists():
        raise CheckpointError(
            f"{KEY}: {source} was trained on {recorded}, and model.base is {base}; use that base, or, where it is the "
            f"same model under another name, set model.base_id: {recorded}"
        )
    return PeftForm(config, tensors)
