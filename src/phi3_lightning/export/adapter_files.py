"""The adapter alone, in the formats in which others read it."""

import json
from collections.abc import Collection
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from phi3_lightning.adapters import convert
from phi3_lightning.adapters.adapter import PeftForm
from phi3_lightning.adapters.targets import Target
from phi3_lightning.errors import ConfigError, ModelError

PREFIX = "base_model.model."
LORALIB_FILE = "lora.pt"
LORALIB_LAYERS = "lora.json"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as ``--max-lora-rank`` (``vllm.config.lora.MaxLoRARanks``, from 8 on)."""


def short_names(model: nn.Module, form: PeftForm) -> list[str]:
    """Return the targets as ``adapter_config.json`` lists them: names of layers where they say the same as the paths.

    Servers look at the last part of a name, and people read a list of four more easily than one of 128.

    Args:
        model: The base model, with or without the adapter's layers.
        form: The adapter.
    """
    paths = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in form.tensors if ".lora_" in name}
    names = {path.rpartition(".")[2] for path in paths}
    covered = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in names}
    return sorted(names if covered == paths else paths)


def write_peft(form: PeftForm, targets: list[str], base: str, revision: str | None, folder: Path) -> None:
    """Write what ``PeftModel.from_pretrained`` and servers read.

    Args:
        form: The adapter.
        targets: Its layers, as :func:`short_names` gives them.
        base: The name of the base, never a local path.
        revision: Branch, tag or commit of the base.
        folder: Where to.

    Raises:
        ModelError: If what is on the disk afterwards is not what was written, bit by bit.
    """
    config = deepcopy(form.config)
    config.target_modules = targets
    config.base_model_name_or_path = base
    config.revision = revision
    config.inference_mode = True
    config.save_pretrained(str(folder))
    described = folder / "adapter_config.json"
    content = json.loads(described.read_text(encoding="utf-8")) | {"target_modules": targets}  # PEFT's set has no order
    described.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in form.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _compare(load_file(folder / "adapter_model.safetensors"), tensors)


def _compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if found.keys() != expected.keys() or not all(torch.equal(found[name], expected[name]) for name in expected):
        raise ModelError("the adapter's file does not hold what was written: the disk, or its driver, is broken")


def write_loralib(form: PeftForm, targets: Collection[Target], folder: Path) -> None:
    """Write what ``loralib.lora_state_dict`` of a model with loralib's layers holds.

    The file has no place for which layer of loralib's goes where with which rank and scale; ``lora.json`` says it. A
    fused layer whose slices are adapted one by one is a ``MergedLinear`` where they are equal, as that class has them,
    and else one ``Linear``.

    Args:
        form: The adapter.
        targets: Its layers.
        folder: Where to.

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
    expressed = [target if len(set(target.slices.values())) == 1 else _whole(target) for target in targets]
    tensors = convert.from_peft(form, expressed, "--format loralib")
    with (folder / LORALIB_FILE).open("wb") as file:  # to which a full disk is an OSError, and not to torch's own
        torch.save(tensors, file)
    _compare(torch.load(folder / LORALIB_FILE, weights_only=True), tensors)
    layers = {target.path: _loralib_layer(target) for target in expressed}
    (folder / LORALIB_LAYERS).write_text(json.dumps(layers, indent=2), encoding="utf-8")


def _whole(target: Target) -> Target:
    """The same update as one of the whole layer."""
    rows = sum(target.slices.values())
    return replace(target, slices={target.name: rows}, enabled=(True,), r=target.r * sum(target.enabled))


def _loralib_layer(target: Target) -> dict[str, Any]:
    """Name of the class in loralib, and the arguments that it takes beside the layer's sizes."""
    scale = {"r": target.r, "lora_alpha": target.scaling * target.r}
    if target.embedding:
        return {"layer": "Embedding", **scale}
    if len(target.slices) == 1:
        return {"layer": "Linear", **scale}
    return {"layer": "MergedLinear", **scale, "enable_lora": list(target.enabled)}


def serving_hint(form: PeftForm, base: str, folder: str) -> str:
    """Say how vLLM serves the adapter, or why it does not.

    Args:
        form: The adapter.
        base: The name of the base.
        folder: The adapter's folder.
    """
    refused = [
        what
        for what, present in (("DoRA", form.config.use_dora), ("modules_to_save", form.config.modules_to_save))
        if present
    ]
    rank = max([form.config.r, *(form.config.rank_pattern or {}).values()])
    allowed = next((size for size in VLLM_RANKS if size >= rank), None)
    if allowed is None:
        refused.append(f"rank {rank} (at most {VLLM_RANKS[-1]})")
    if refused:
        return f"vLLM takes no adapter with {' or '.join(refused)}: serve the merged model (--format merged)"
    return f"vllm serve {base} --enable-lora --lora-modules {folder}={folder} --max-lora-rank {allowed}"
