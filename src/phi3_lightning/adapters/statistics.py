"""Norm and effective rank of an adapter's LoRA deltas, without a dense delta."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812
from transformers import Phi3ForCausalLM

from phi3_lightning.adapters import targets
from phi3_lightning.adapters.adapter import Adapter
from phi3_lightning.adapters.targets import Target


@dataclass(frozen=True)
class LoraDelta:
    """The LoRA delta of one matrix."""

    layer: str
    """Path of the layer."""
    slice: str
    """Name of the matrix in it; the layer's own where nothing is fused."""
    relative_norm: float | None
    """Frobenius norm of ``scaling * B @ A`` over that of the matrix; None over a base in 8 bits."""
    effective_rank: float
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007, "The effective rank"):
    1 for one direction, the rank for as many that are equally strong, 0 for no LoRA delta."""


class Statistics:
    """Measures the LoRA deltas of an adapter, and its gradients.

    Norms of the frozen matrices are computed once. Over a sharded model each call is a collective for all ranks.
    """

    def __init__(self, model: Phi3ForCausalLM, adapter: Adapter) -> None:
        self._model = model
        self._adapter = adapter
        self._norms: dict[str, Tensor | None] = {}

    @torch.no_grad()
    def deltas(self) -> list[LoraDelta]:
        """Return one entry for each adapted matrix."""
        names: list[tuple[Target, str]] = []
        grams: list[Tensor] = []
        weights: list[float] = []
        for target in self._adapter.targets:
            norms = self._weight_norms(target)
            for index, (name, down, up) in enumerate(self._slices(target)):
                names.append((target, name))
                grams.append(torch.stack([down @ down.T, up.T @ up * target.scaling**2]))
                weights.append(float("nan") if norms is None else norms[index].item())
        rank = max(len(gram[0]) for gram in grams)
        padded = torch.stack([F.pad(gram, (0, rank - gram.shape[-1]) * 2) for gram in grams]).cpu()
        singular = _singular_values(padded[:, 0], padded[:, 1])
        relative = singular.norm(dim=-1) / torch.tensor(weights)
        entries = zip(names, relative.tolist(), _effective_rank(singular).tolist(), strict=True)
        return [LoraDelta(t.path, name, None if norm != norm else norm, rank) for (t, name), norm, rank in entries]

    @torch.no_grad()
    def gradient_norms(self) -> dict[str, float]:
        """Return the norm of the gradient of each layer's ``A`` and ``B`` together, by its path."""
        pairs = [self._adapter.lora_AB(target) for target in self._adapter.targets]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for pair in pairs for p in pair]
        norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in torch._foreach_norm(gradients)]
        layers = torch.stack(norms).double().reshape(-1, 2).norm(dim=1).tolist()
        return {target.path: norm for target, norm in zip(self._adapter.targets, layers, strict=True)}

    def _slices(self, target: Target) -> list[tuple[str, Tensor, Tensor]]:
        """Name, ``A`` and ``B`` of each adapted matrix of a layer, float64."""
        down, up = (_full_tensor(factor).double() for factor in self._adapter.lora_AB(target))
        if len(target.slices) > 1:  # each has its own A
            rows = list(target.adapted.values())
            return list(zip(target.adapted, down.split(target.r), up.split(rows), strict=True))
        matrices = targets.fused(self._model, target)
        return [(name, down, part) for name, part in zip(matrices, up.split(list(matrices.values())), strict=True)]

    def _weight_norms(self, target: Target) -> Tensor | None:
        """Norms of the adapted matrices of a layer, float64, on the CPU."""
        if target.path not in self._norms:
            self._norms[target.path] = self._measure(target)
        return self._norms[target.path]

    def _measure(self, target: Target) -> Tensor | None:
        layer: Any = self._model.get_submodule(target.path)
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        if layer.weight.dtype == torch.int8:  # its scales move from the weight to the layer when it is first used
            return None
        weight = _full_tensor(dequantize_module_weight(layer) if layer.weight.dtype == torch.uint8 else layer.weight)
        if target.embedding:
            weights, adapted = {target.name: weight}, target.slices
        else:
            matrices = targets.fused(self._model, target)
            weights = dict(zip(matrices, weight.split(list(matrices.values())), strict=True))
            adapted = target.adapted if len(target.slices) > 1 else matrices
        norms: list[Tensor] = [torch.linalg.vector_norm(weights[name].float()) for name in adapted]
        return torch.stack(norms).double().cpu()


def _singular_values(down: Tensor, up: Tensor) -> Tensor:
    """Singular values of ``B @ A`` from ``A @ A.T`` and ``B.T @ B``, shapes (LoRA deltas, rank, rank), float64.

    They are the roots of the eigenvalues of the product, which is that of a symmetric matrix once a root of the first
    is put on either side of the second.
    """
    values, vectors = torch.linalg.eigh(down)
    root = vectors * values.clamp(min=0).sqrt()[:, None, :]
    squares: Tensor = torch.linalg.eigvalsh(root.mT @ up @ root)
    return squares.clamp(min=0).sqrt()


def _effective_rank(singular: Tensor) -> Tensor:
    total = singular.sum(-1, keepdim=True)
    share = singular / total.clamp(min=torch.finfo(singular.dtype).tiny)
    return torch.where(total[:, 0] > 0, torch.special.entr(share).sum(-1).exp(), 0.0)


def _full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, which may be sharded, with its shards on the CPU or not."""
    if not isinstance(tensor, DTensor):
        return tensor
    return cast("DTensor", tensor.to(tensor.device_mesh.device_type)).full_tensor()
