"""From the names that the user writes to the modules that exist."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import Phi3ForCausalLM

from phi3_lightning.errors import ModelError

FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Llama's names for what Phi-3 fuses into one matrix."""


def resolve(model: Phi3ForCausalLM, targets: list[str] | str) -> list[str]:
    """Return the paths of the modules that ``targets`` names.

    Args:
        model: The base model; it may be on the meta device.
        targets: Names of layers, ``all-linear`` (every linear layer of the decoder blocks, not the head),
            or one regular expression for whole module paths.

    Returns:
        Paths as ``named_modules`` gives them, in its order.

    Raises:
        ModelError: If a name matches nothing, or a match cannot carry a LoRA adapter.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    if targets == "all-linear":
        return [name for name in linear if ".layers." in name]
    if isinstance(targets, str):
        found = [name for name in linear if re.fullmatch(targets, name)]
        unmatched = [] if found else [targets]
    else:
        found = [name for name in linear if any(_ends_with(name, target) for target in targets)]
        unmatched = [target for target in targets if not any(_ends_with(name, target) for name in linear)]
    if unmatched:
        raise ModelError(_no_match(unmatched, linear))
    if model.config.tie_word_embeddings and any(_ends_with(name, "lm_head") for name in found):
        raise ModelError(
            "model.lora.target_modules: lm_head shares its weight with embed_tokens in this model, "
            "and an adapter on one would not be on the other; leave lm_head out"
        )
    return found


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _no_match(unmatched: list[str], linear: Iterable[str]) -> str:
    existing = sorted({name.rpartition(".")[2] for name in linear})
    message = f"model.lora.target_modules: {', '.join(unmatched)} matches no layer; there are {', '.join(existing)}"
    fused = sorted({f"{name} in {FUSED[name]}" for name in unmatched if name in FUSED})
    if fused:
        message += f". Phi-3 fuses {', '.join(fused)}: name the fused layer"
    return message


@dataclass(frozen=True)
class Coverage:
    """What the adapters of one kind of layer come to."""

    layer: str
    """Name of the layer, without its path."""
    adapted: int
    """How many such layers carry an adapter."""
    existing: int
    """How many such layers the model has."""
    parameters: int
    """Trainable values of all of them."""


def coverage(model: nn.Module, targets: list[str]) -> list[Coverage]:
    """Sum the adapters up by kind of layer.

    Args:
        model: The model with adapters.
        targets: The paths that :func:`resolve` gave.

    Returns:
        One entry for each kind of layer that is adapted.
    """
    kinds = Counter(path.rpartition(".")[2] for path in targets)
    existing = Counter(
        name.rpartition(".")[2] for name, module in model.named_modules() if not name.endswith("base_layer")
    )
    sizes: Counter[str] = Counter()
    for path in targets:
        trainable = (p for p in model.get_submodule(path).parameters() if p.requires_grad)
        sizes[path.rpartition(".")[2]] += sum(parameter.numel() for parameter in trainable)
    return [Coverage(kind, count, existing[kind], sizes[kind]) for kind, count in kinds.items()]
