"""A plain model with loralib's own layers, which reads a loralib file back."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Phi3ForCausalLM

from phi3_lightning.errors import ModelError
from phi3_lightning.export.adapter_files import LORALIB_FILE, LORALIB_LAYERS


def with_loralib(model: Phi3ForCausalLM, folder: Path) -> Phi3ForCausalLM:
    """Replace the layers that ``lora.json`` names by loralib's own, and load the file."""
    try:
        import loralib
    except ImportError as error:
        raise ModelError("--format loralib: reading it back needs pip install 'phi3-lightning[loralib]'") from error

    for path, arguments in json.loads((folder / LORALIB_LAYERS).read_text(encoding="utf-8")).items():
        frozen: Any = model.get_submodule(path)
        if type(frozen) not in (nn.Linear, nn.Embedding):
            raise ModelError(f"--format loralib: {path} is a {type(frozen).__name__}; loralib adapts plain layers")
        sizes = frozen.weight.shape if isinstance(frozen, nn.Embedding) else reversed(frozen.weight.shape)
        layer = getattr(loralib, arguments.pop("layer"))(*sizes, **arguments, merge_weights=False)
        loralib.mark_only_lora_as_trainable(layer)
        for name, parameter in list(layer.named_parameters()):
            if parameter.requires_grad:  # computed, as everything, in the type of the base
                setattr(layer, name, nn.Parameter(parameter.to(frozen.weight.dtype)))
            else:  # the weight, and None for the bias that loralib has made
                setattr(layer, name, getattr(frozen, name))
        model.set_submodule(path, layer.to(frozen.weight.device))
    tensors: dict[str, Tensor] = torch.load(folder / LORALIB_FILE, weights_only=True)
    unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
    if unexpected:
        raise ModelError(f"--format loralib: the file does not fit the base: {', '.join(unexpected[:5])}")
    return cast("Phi3ForCausalLM", model.eval())
