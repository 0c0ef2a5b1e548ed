"""A plain model with loralib's own layers, to read a loralib file back with."""

import json
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import Phi3ForCausalLM

from phi3_lightning.errors import ModelError
from phi3_lightning.export.adapter_files import LORALIB_FILE


def with_loralib(model: Phi3ForCausalLM, folder: Path) -> Phi3ForCausalLM:
    """Replace the layers that a file names by ``loralib.Linear``, and load the file.

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

    tensors: dict[str, Tensor] = torch.load(folder / LORALIB_FILE, weights_only=True)
    scale = json.loads((folder / "lora.json").read_text(encoding="utf-8"))
    for path in {name.rpartition(".")[0] for name in tensors}:
        linear = model.get_submodule(path)
        if type(linear) is not nn.Linear:
            raise ModelError(
                f"--format loralib: {path} is a {type(linear).__name__}; loralib adapts plain linear layers"
            )
        layer = loralib.Linear(
            linear.in_features, linear.out_features, **scale, bias=linear.bias is not None, merge_weights=False
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        for part in ("lora_A", "lora_B"):  # computed, as everything, in the type of the base
            setattr(layer, part, nn.Parameter(getattr(layer, part).to(linear.weight.dtype)))
        model.set_submodule(path, layer.to(linear.weight.device))
    unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
    if unexpected:
        raise ModelError(f"--format loralib: the file does not fit the base: {', '.join(unexpected[:5])}")
    return cast("Phi3ForCausalLM", model.eval())
