"""Starting from an existing adapter: PEFT's files, loralib's, or a checkpoint of this package."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from phi3_lightning.adapters import adapter_config, convert, targets
from phi3_lightning.adapters.adapter import Adapter, PeftForm
from phi3_lightning.adapters.adapter_config import AdapterConfig
from phi3_lightning.adapters.targets import Target
from phi3_lightning.checkpoint.identity import changed_adapter, changed_base, read_identity
from phi3_lightning.checkpoint.io import read_checkpoint
from phi3_lightning.config import LoRA
from phi3_lightning.errors import CheckpointError
from phi3_lightning.hub import split_revision

KEY = "model.lora.init_from"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
NO_SCALE = "the file does not record how its LoRA deltas are scaled, and lora_alpha / r of model.lora counts"
"""Of a file of loralib's, without the lora.json that ``export`` writes beside it."""


def load_into(adapter: Adapter, model: nn.Module, lora: LoRA, base: str | None) -> None:
    """Set a fresh adapter to the values of ``lora.init_from``, which must have its rank, scale and targets."""
    source = str(lora.init_from)
    where = f"{KEY}: {source}"
    suffix = Path(source).suffix
    if suffix in (".ckpt", ".pt"):
        state = _of_checkpoint(source, lora, adapter) if suffix == ".ckpt" else _of_loralib(source, lora, adapter)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        convert.check_tensors(state, trained, where)
        model.load_state_dict(state, strict=False)
    else:
        config = read_config(lora, base)
        assert config is not None  # it is neither of the others
        adapter.load_peft(PeftForm(config.to_peft(), _peft_tensors(source)), where)
    rank_zero_info(f"adapter: starting from {source}")


def read_config(lora: LoRA, base: str | None) -> AdapterConfig | None:
    """Read the configuration of an adapter in PEFT's format; None where the section names no such adapter.

    Raises:
        CheckpointError: If it cannot be read, is of a kind that is not computed here, or is of another base.
    """
    source = lora.init_from
    if source is None or Path(source).suffix in (".ckpt", ".pt"):
        return None
    config = adapter_config.read(source, KEY)
    if base and config.base and config.base != base and not Path(config.base).exists():
        raise CheckpointError(
            f"{KEY}: {source} was trained on {config.base}, and model.base is {base}; use that base, or, where it is "
            f"the same model under another name, set model.base_id: {config.base}"
        )
    return config


def check_origin(lora: LoRA, base: str | None, revision: str | None, fingerprint: str) -> None:
    """Refuse a checkpoint to start from that was trained on other base weights, and warn of another revision.

    It is a step of its own: sharded weights are read after the adapter is attached. An adapter in PEFT's format records
    the revision of its base, and nothing of its weights.
    """
    config = read_config(lora, base)
    if config is not None and config.revision and config.base == base and config.revision != (revision or "main"):
        rank_zero_warn(
            f"{KEY}: {lora.init_from} was trained on {base} at revision {config.revision}, and model.revision is "
            f"{revision or 'null'}, whose weights may be others; set model.revision: {config.revision}"
        )
    if lora.init_from is None or Path(lora.init_from).suffix != ".ckpt":
        return
    former = _read_checkpoint(lora.init_from)[1]
    if change := changed_base(former, {"base": base, "revision": revision, "fingerprint": fingerprint}):
        remedy = "or export it to PEFT's format, which fits any dtype and quantization of its base"
        raise CheckpointError(f"{KEY}: {lora.init_from}: {change}, {remedy}")


def _read_checkpoint(source: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """A checkpoint of this package, and its identity block."""
    try:
        content = read_checkpoint(Path(source))
        return content, read_identity(content)
    except CheckpointError as error:
        raise CheckpointError(f"{KEY}: {source}: {str(error).removeprefix(f'{Path(source)}: ')}") from error


def _of_checkpoint(source: str, lora: LoRA, adapter: Adapter) -> dict[str, Tensor]:
    content, former = _read_checkpoint(source)
    if changes := changed_adapter(former, targets.describe_adapter(lora, adapter.targets)):
        raise CheckpointError(f"{KEY}: {source} holds another adapter: {changes}; configure the same")
    prefix = "model."
    return {n.removeprefix(prefix): tensor for n, tensor in content["state_dict"].items() if n.startswith(prefix)}


def _of_loralib(source: str, lora: LoRA, adapter: Adapter) -> dict[str, Tensor]:
    content = _read_torch(source)
    where = f"{KEY}: {source}"
    if lora.backend != "loralib":
        raise CheckpointError(f"{where} is a file of loralib's; set model.lora.backend: loralib")
    foreign = [
        str(name) for name, value in content.items() if "lora_" not in str(name) or not isinstance(value, Tensor)
    ]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise CheckpointError(
            f"{where}: {foreign[0]}{more}: no tensor of an adapter; save what loralib.lora_state_dict(model) returns"
        )
    _check_layers(Path(source).with_suffix(".json"), adapter.targets, where)
    return dict(content)


def _check_layers(description: Path, adapted: list[Target], where: str) -> None:
    """Refuse layers with another scale than in training, which a file of loralib's alone does not record."""
    if not description.is_file():
        scales = ", ".join(f"{scaling:g}" for scaling in sorted({target.scaling for target in adapted}))
        rank_zero_info(f"{where}: {NO_SCALE}, {scales}")
        return
    try:
        layers = {
            path: (layer["lora_alpha"] / layer["r"], layer.get("enable_lora", [True]))
            for path, layer in json.loads(description.read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: {description} does not describe its layers ({error!r})") from error
    for target in adapted:
        scaling, enabled = layers.get(target.path, (target.scaling, list(target.enabled)))
        if not math.isclose(scaling, target.scaling) or enabled != list(target.enabled):
            raise CheckpointError(
                f"{where}: {description.name} has {target.path} scaled by {scaling:g} with slices {enabled}, and by "
                f"model.lora it is {target.scaling:g} with {list(target.enabled)}; configure the same"
            )


def _read_torch(source: str) -> Mapping[str, Any]:
    if not Path(source).is_file():
        raise CheckpointError(f"{KEY}: there is no file {source}")
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is cut or foreign
        raise CheckpointError(
            f"{KEY}: {source} is not a whole checkpoint of tensors and plain types ({type(error).__name__})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{KEY}: {source} holds a {type(content).__name__} and no tensors by name")
    return content


def _peft_tensors(source: str) -> dict[str, Tensor]:
    folder = Path(source)
    if (folder / PICKLED).is_file() and not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"{KEY}: {source} has {PICKLED}, which can run code when it is read. Where you trust it, write it again: "
            f"PeftModel.from_pretrained(BASE, {source!r}).save_pretrained({source!r}) of PEFT makes {WEIGHTS}"
        )
    name, revision = split_revision(KEY, source)
    try:
        tensors: dict[str, Tensor] = load_file(
            folder / WEIGHTS if folder.is_dir() else hf_hub_download(name, WEIGHTS, revision=revision)
        )
    except (OSError, ValueError, SafetensorError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(f"{KEY}: {source}: {WEIGHTS} cannot be read ({error})") from error
    frozen = [name for name in tensors if ".base_layer." in name]
    if frozen:
        raise CheckpointError(
            f"{KEY}: {source}: {WEIGHTS} holds weights of the base ({frozen[0]}), which stay as they are here; save it "
            "again with save_pretrained(FOLDER, save_embedding_layers=False) of PEFT"
        )
    return tensors
