"""The adapter alone, in the formats of PEFT and loralib."""

import json
from collections.abc import Collection
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phi3_lightning.adapters import convert
from phi3_lightning.adapters.adapter import PeftForm
from phi3_lightning.adapters.targets import Target
from phi3_lightning.errors import ConfigError, ModelError

LORALIB_FILE = "lora.pt"
LORALIB_LAYERS = "lora.json"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as ``--max-lora-rank`` (``vllm.config.lora.MaxLoRARanks``, from 8 on)."""


def write_peft(form: PeftForm, base: str, revision: str | None, folder: Path) -> None:
    """Write what ``PeftModel.from_pretrained`` and servers read; ``base`` is a name, never a local path.

    Raises:
        ModelError: If what is on the disk afterwards is not what was written, bit by bit.
    """
    config = deepcopy(form.config)
    config.target_modules = sorted(config.target_modules or [])  # of PEFT's set, which has no order
    config.base_model_name_or_path = base
    config.revision = revision
    config.inference_mode = True
    config.save_pretrained(str(folder))
    tensors = {name: tensor.contiguous() for name, tensor in form.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _check_written(load_file(folder / "adapter_model.safetensors"), tensors)


def _check_written(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if actual.keys() != expected.keys() or not all(torch.equal(actual[name], expected[name]) for name in expected):
        raise ModelError("the adapter's file does not hold what was written: the disk, or its driver, is broken")


def write_loralib(form: PeftForm, targets: Collection[Target], folder: Path) -> None:
    """Write what ``loralib.lora_state_dict`` of a model with loralib's layers holds.

    The file has no place for layers, ranks and scales, which ``lora.json`` records. A fused layer whose slices are
    adapted one by one is a ``MergedLinear`` where they are equal, as that class has them, and one ``Linear`` otherwise.

    Raises:
        ConfigError: If loralib's layers cannot express the adapter.
    """
    known = {name for target in targets for name in convert.peft_keys(target)}
    foreign = sorted(form.tensors.keys() - known)
    if foreign:
        raise ConfigError(
            "--format loralib: loralib's layers have the matrices A and B alone, and this adapter has more "
            f"({', '.join(foreign[:2])}); export it as peft or merged"
        )
    layers = [target if len(set(target.slices.values())) == 1 else _unsliced(target) for target in targets]
    tensors = convert.from_peft(form, layers, "--format loralib")
    with (folder / LORALIB_FILE).open("wb") as file:  # a full disk is an OSError here, and not from torch's own writer
        torch.save(tensors, file)
    _check_written(torch.load(folder / LORALIB_FILE, weights_only=True), tensors)
    description = {target.path: _loralib_layer(target) for target in layers}
    (folder / LORALIB_LAYERS).write_text(json.dumps(description, indent=2), encoding="utf-8")


def _unsliced(target: Target) -> Target:
    """The same LoRA delta as one of the full layer."""
    rows = sum(target.slices.values())
    return replace(target, slices={target.name: rows}, enabled=(True,), r=target.r * sum(target.enabled))


def _loralib_layer(target: Target) -> dict[str, Any]:
    """Name of the class in loralib, and its arguments besides the layer's sizes."""
    scale = {"r": target.r, "lora_alpha": target.scaling * target.r}
    if len(target.slices) == 1:
        return {"layer": "Embedding" if target.embedding else "Linear", **scale}
    return {"layer": "MergedLinear", **scale, "enable_lora": list(target.enabled)}


def serving_hint(form: PeftForm, base: str, folder: str, revision: str | None = None) -> str:
    """Return how vLLM serves the adapter, or why it does not."""
    options = {"DoRA": form.config.use_dora, "modules_to_save": form.config.modules_to_save}
    refused = [name for name, value in options.items() if value]
    rank = max([form.config.r, *(form.config.rank_pattern or {}).values()])
    allowed = next((size for size in VLLM_RANKS if size >= rank), None)
    if allowed is None:
        refused.append(f"rank {rank} (at most {VLLM_RANKS[-1]})")
    if refused:
        return f"vLLM takes no adapter with {' or '.join(refused)}: serve the merged model (--format merged)"
    at = "" if revision is None else f" --revision {revision}"
    return f"vllm serve {base}{at} --enable-lora --lora-modules {folder}={folder} --max-lora-rank {allowed}"
