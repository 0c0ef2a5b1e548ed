"""A plain model with loralib's own layers, to read a loralib file back with."""

import json
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import Phi3ForCausalLM

from phi3_lightning.errors import ModelError
from phi3_lightning.export.adapter_files import LORALIB_FILE, LORALIB_LAYERS


def with_loralib(model: Phi3ForCausalLM, folder: Path) -> Phi3ForCausalLM:
    """Replace the layers that ``lora.json`` names by loralib's own, and load the file.

    Args:
        model: The base model; changed in place, its weights stay.
        folder: What ``write_loralib`` has written.

    Raises:
        ModelError: If loralib is not installed, or the file does not fit.
    """
    try:
        import loralib
    except ImportError as error:
        raise ModelError("--format loralib: reading it back needs pip install 'phi3-lightning[loralib]'") from error

    for path, described in json.loads((folder / LORALIB_LAYERS).read_text(encoding="utf-8")).items():
        frozen = model.get_submodule(path)
        if type(frozen) not in (nn.Linear, nn.Embedding):
            raise ModelError(f"--format loralib: {path} is a {type(frozen).__name__}; loralib adapts plain layers")
        layer = getattr(loralib, described.pop("layer"))(*_sizes(frozen), **described, merge_weights=False)
        for name in dict(layer.named_parameters()).keys() - {"lora_A", "lora_B"}:
            setattr(layer, name, getattr(frozen, name))  # weight, and None for the bias that loralib has made
        for part in ("lora_A", "lora_B"):  # computed, as everything, in the type of the base
            setattr(layer, part, nn.Parameter(getattr(layer, part).to(frozen.weight.dtype)))
        model.set_submodule(path, layer.to(frozen.weight.device))
    tensors: dict[str, Tensor] = torch.load(folder / LORALIB_FILE, weights_only=True)
    unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
    if unexpected:
        raise ModelError(f"--format loralib: the file does not fit the base: {', '.join(unexpected[:5])}")
    return cast("Phi3ForCausalLM", model.eval())


def _sizes(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    linear = cast("nn.Linear", layer)
    return linear.in_features, linear.out_features
