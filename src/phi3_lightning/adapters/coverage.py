"""What is adapted, by kind of layer or slice."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from phi3_lightning.adapters.adapter import Adapter


@dataclass(frozen=True)
class Coverage:
    """The adapters of one kind of layer or slice."""

    layer: str
    """Name of the layer without its path, or of a slice and its layer."""
    adapted: int
    """How many of them carry an adapter, or are trained in full."""
    existing: int
    """How many of them the model has."""
    ranks: tuple[int, ...]
    """The ranks of their adapters; empty where they are trained in full."""
    parameters: int
    """Trainable values of all of them."""


def coverage(model: nn.Module, adapter: Adapter) -> list[Coverage]:
    """Summarise an adapter by kind of layer or slice."""
    existing = Counter(name.rpartition(".")[2] for name, _ in model.named_modules())
    kinds: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for target in adapter.targets:
        layer: Any = model.get_submodule(target.path)
        for name, rows in target.adapted.items():
            label = name if name == target.name else f"{name} of {target.name}"
            parameters = _trainable(layer) if len(target.slices) == 1 else target.r * (layer.in_features + rows)
            kinds.setdefault((label, target.name), []).append((target.r, parameters))
    for path in adapter.modules_to_save:
        name = path.rpartition(".")[2]
        kinds.setdefault((f"{name} (whole)", name), []).append((0, _trainable(model.get_submodule(path))))
    return [
        Coverage(label, len(each), existing[name], tuple(sorted({r for r, _ in each if r})), sum(n for _, n in each))
        for (label, name), each in kinds.items()
    ]


def _trainable(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
