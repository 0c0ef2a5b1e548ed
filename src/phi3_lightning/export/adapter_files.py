"""The adapter alone, in the formats in which others read it."""

import json
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from phi3_lightning.adapters.adapter import PeftForm
from phi3_lightning.errors import ConfigError, ModelError

PREFIX = "base_model.model."
LORALIB_FILE = "lora.pt"
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


def write_loralib(form: PeftForm, folder: Path) -> None:
    """Write what ``loralib.lora_state_dict`` of a model with ``loralib.Linear`` layers holds.

    The file has no place for rank and scale, which ``lora.json`` beside it says.

    Args:
        form: The adapter.
        folder: Where to.

    Raises:
        ConfigError: If loralib's layers cannot express the adapter.
    """
    config = form.config
    foreign = [name for name in form.tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if foreign or config.use_rslora or config.rank_pattern or config.alpha_pattern:
        raise ConfigError(
            "--format loralib: loralib's layers know one rank, one scale lora_alpha / r, and matrices A and B alone, "
            f"and this adapter has more ({', '.join(foreign[:2]) or 'rsLoRA or patterns'}); export it as peft or merged"
        )
    tensors = {name.removeprefix(PREFIX).removesuffix(".weight"): tensor for name, tensor in form.tensors.items()}
    torch.save(tensors, folder / LORALIB_FILE)
    _compare(torch.load(folder / LORALIB_FILE, weights_only=True), tensors)
    scale = {"r": config.r, "lora_alpha": config.lora_alpha}
    (folder / "lora.json").write_text(json.dumps(scale, indent=2), encoding="utf-8")


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
