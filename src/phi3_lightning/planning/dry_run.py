"""A training step without values: the code of a real step, on tensors that have only shapes.

``FakeTensorMode`` runs each operation on shapes alone, and a dispatch mode adds up the storages that are alive. Nothing
is allocated or computed, and no weight is read. Layers that are alike need the same memory each, so that two shallow
runs tell what a deep model needs.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phi3_lightning.model.activation_checkpointing import CheckpointingMode, checkpoint_activations, recomputed_share
from phi3_lightning.model.document_attention import MAX_SAVED_KEYS, max_saved_keys
from phi3_lightning.planning.spec import RunSpec
from phi3_lightning.planning.step import BatchShape, build_meta_model, take_step

EXTRAPOLATED_DEPTHS = (2, 3)
"""Layers of the two runs that deep models are extrapolated from; the first layer differs, as no gradient passes it."""


@dataclass(frozen=True)
class Activations:
    """Bytes that a micro-batch needs besides weights, gradients and optimiser state."""

    stored: float
    """From the forward pass to the backward pass."""
    head: float
    """Logits and their gradients at the peak, besides ``stored``."""
    layer: float
    """A layer's pass, forward or backward, at the peak, besides ``stored``."""
    reference: float
    """A forward pass without a gradient at the peak, besides ``stored``; 0 where the objective takes none."""

    @property
    def peak(self) -> float:
        """All at the peak."""
        return self.stored + max(self.head, self.layer, self.reference)


class FakeModule:
    """A run's model with its adapter, whose tensors have shapes and types, and no values.

    Raises:
        ModelError: If a target names no layer of the base.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self._cache: dict[str, Activations] = {}
        self.model, self._adapter = build_meta_model(spec)
        """The model; it runs on fake batches alone."""
        self._fake_tensors = FakeTensorMode(allow_non_fake_inputs=True)  # what is on the meta device becomes fake
        with self._fake_tensors:
            self.model.to_empty(device="cpu")
            self.model.tie_weights()

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that training changes."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def alike(self) -> bool:
        """Whether all layers carry the same adapter."""
        shapes = [
            {name: parameter.shape for name, parameter in layer.named_parameters() if parameter.requires_grad}
            for layer in self.model.model.layers
        ]
        return all(shape == shapes[0] for shape in shapes)

    def activations(self, shape: BatchShape, mode: CheckpointingMode | int) -> Activations:
        """Return what a micro-batch needs in training."""
        key = str((shape, mode))
        if key not in self._cache:
            self._cache[key] = self._activations(shape, mode)
        return self._cache[key]

    def validation_activations(self, shape: BatchShape) -> Activations:
        """Return what a micro-batch needs in validation, which keeps nothing of a layer for a backward pass."""
        key = f"validation of {shape}"
        if key not in self._cache:
            self._cache[key] = self._at_full_depth(shape, self._validate)
        return self._cache[key]

    def _activations(self, shape: BatchShape, mode: CheckpointingMode | int) -> Activations:
        depth = len(self.model.model.layers)
        if isinstance(mode, int):  # some layers store all, and the others one hidden state
            share = recomputed_share(mode, depth)
            none, full = (self.activations(shape, each) for each in ("none", "full"))
            mixture = (1 - share) * none.stored + share * full.stored
            return Activations(
                mixture, *(max(getattr(none, name), getattr(full, name)) for name in ("head", "layer", "reference"))
            )
        if mode == "offload":
            states = shape.tokens * self.model.config.hidden_size * self.model.dtype.itemsize
            full = self.activations(shape, "full")
            return replace(full, stored=max(full.stored - depth * states, 0))
        checkpoint_activations(self.model, mode)
        return self._at_full_depth(shape, self._train)

    def _at_full_depth(self, shape: BatchShape, run: Callable[[BatchShape], Activations]) -> Activations:
        config, depth = self.model.config, len(self.model.model.layers)
        if depth <= max(EXTRAPOLATED_DEPTHS) or not self.alike:
            return run(shape)
        runs = []
        try:
            for config.num_hidden_layers in EXTRAPOLATED_DEPTHS:
                runs.append(run(shape))
        finally:
            config.num_hidden_layers = depth
        return _extrapolated(runs[0], runs[1], depth)

    def _train(self, shape: BatchShape) -> Activations:
        (forward, _), (head, _), (reference, stored), (backward, _) = self._phases(shape, trains=True)
        peaks = head, max(forward, backward), self._of_reference(reference)
        return Activations(stored, *(max(peak - stored, 0) for peak in peaks))

    def _validate(self, shape: BatchShape) -> Activations:
        (forward, stored), (head, _), (reference, _) = self._phases(shape, trains=False)
        peaks = head, forward, self._of_reference(reference)
        return Activations(stored, *(max(peak - stored, 0) for peak in peaks))

    def _of_reference(self, peak: int) -> int:
        return peak if self.spec.objective.extra_forward_passes else 0

    def _phases(self, shape: BatchShape, *, trains: bool) -> list[tuple[int, int]]:
        """The bytes at the peak of each phase of a step, and those alive at its end."""
        phases: list[tuple[int, int]] = []
        with self._fake_tensors:
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)  # of the micro-batches before
        gradients = [parameter.grad for parameter in self.trained]
        saved = max_saved_keys.set(0 if self.spec.on_gpu else MAX_SAVED_KEYS)
        try:
            with (
                self._fake_tensors,
                _Storages([*self.model.parameters(), *self.model.buffers(), *gradients]) as storages,
            ):
                take_step(
                    self.model,
                    self._adapter,
                    self.spec,
                    shape,
                    on_phase=lambda: phases.append((storages.restart(), storages.live)),
                    trains=trains,
                )
        finally:
            max_saved_keys.reset(saved)
        return phases


class _Storages(TorchDispatchMode):
    """Adds up the bytes of all storages that are alive, except those of tensors that exist already."""

    def __init__(self, existing: list[Tensor | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self._peak = 0
        self._bytes: dict[int, int] = {}
        self._existing = {tensor.untyped_storage()._cdata for tensor in existing if tensor is not None}

    def restart(self) -> int:
        """Return the most bytes that were alive since the last call."""
        peak, self._peak = self._peak, self.live
        return peak

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._bytes or key in self._existing:
            return
        self._bytes[key] = storage.nbytes()
        self.live += self._bytes[key]
        self._peak = max(self._peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._bytes.pop(key)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf)
        return result


def _extrapolated(shallow: Activations, deeper: Activations, depth: int) -> Activations:
    """The activations at a depth: whole peaks grow by the same with each layer; the rest over ``stored`` does not."""
    start, end = EXTRAPOLATED_DEPTHS

    def at(first: float, second: float) -> float:
        return first + (second - first) / (end - start) * (depth - start)

    stored = at(shallow.stored, deeper.stored)
    names = ("head", "layer", "reference") if shallow.reference else ("head", "layer")
    peaks = (at(shallow.stored + getattr(shallow, name), deeper.stored + getattr(deeper, name)) for name in names)
    above = {name: max(peak - stored, 0) for name, peak in zip(names, peaks, strict=True)}
    return replace(shallow, stored=stored, **above)
