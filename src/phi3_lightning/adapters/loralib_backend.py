"""LoRA by loralib: its layers in place of the frozen ones, each slice of a fused layer on its own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import loralib
import torch
from torch import Tensor, nn
from transformers import Phi3ForCausalLM

from phi3_lightning.adapters import convert, loralib_layers, targets
from phi3_lightning.adapters.adapter import PeftForm
from phi3_lightning.adapters.targets import Target
from phi3_lightning.config import LoRA


class LoralibAdapter:
    """LoRA layers of loralib on a model.

    The adapter's weights are float32 whatever the type of the base and of torch's default. Base weights are never
    written, and keep their names: ``qkv_proj.weight`` beside ``qkv_proj.lora_A`` and ``qkv_proj.lora_B``.

    Args:
        model: The frozen base model; its target layers become loralib's, in place.
        config: Rank, scale, dropout, targets and slices.

    Raises:
        ModelError: If a target does not exist in ``model``.
    """

    trained_whole: list[str] = []
    """loralib trains no module whole."""

    def __init__(self, model: Phi3ForCausalLM, config: LoRA) -> None:
        self.targets: list[Target] = targets.resolve(model, config)
        """The adapted layers."""
        self._model = model
        self._dropout = config.lora_dropout
        self._names = targets.short_names(model, [target.path for target in self.targets])
        for target, layer in zip(self.targets, self._layers(), strict=True):
            loralib_layers.adapt(layer, target, config.lora_dropout)
        loralib.mark_only_lora_as_trainable(model)

    def _layers(self) -> Iterator[Any]:
        return (self._model.get_submodule(target.path) for target in self.targets)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable parameters of the adapter."""
        return (parameter for layer in self._layers() for parameter in (layer.lora_A, layer.lora_B))

    def lora_AB(self, target: Target) -> tuple[nn.Parameter, nn.Parameter]:
        """Return the live ``A`` and ``B`` of a layer: of each adapted slice, one below the other."""
        layer: Any = self._model.get_submodule(target.path)
        return layer.lora_A, layer.lora_B

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the model answer as its base does, while the context lasts."""
        self._let(merged=True)  # a layer that takes itself for merged adds nothing, and none ever merges
        try:
            yield
        finally:
            self._let(merged=False)

    def _let(self, merged: bool) -> None:
        for layer in self._layers():
            layer.merged = merged

    def state_dict(self) -> dict[str, Tensor]:
        """Return the adapter as loralib's files hold it."""
        return cast("dict[str, Tensor]", loralib.lora_state_dict(self._model))

    def load(self, state: Mapping[str, Tensor], source: str) -> None:
        """Set the adapter to what a loralib file holds.

        Args:
            state: What :meth:`state_dict` gives.
            source: Where it comes from, for errors.

        Raises:
            CheckpointError: If a tensor is missing, unexpected or of another shape.
        """
        convert.check_tensors(state, self.state_dict(), source)
        self._model.load_state_dict(state, strict=False)

    def to_peft(self) -> PeftForm:
        """Return the adapter in the form of PEFT's files, with one rank and one scale for all layers."""
        return convert.to_peft(self.state_dict(), self.targets, self._names, self._dropout)

    @torch.no_grad()
    def set_lora_A(self, directions: Mapping[str, Tensor]) -> None:
        """Set ``A`` of each slice to a layer's first directions.

        Args:
            directions: By the layer's path, shape (at least the rank, in); layers that are not named stay as they are.
        """
        for target, layer in zip(self.targets, self._layers(), strict=True):
            if target.path in directions:
                layer.lora_A.copy_(directions[target.path][: target.r].repeat(len(target.adapted), 1))

    def load_peft(self, form: PeftForm, source: str) -> None:
        """Set the adapter to what PEFT's files hold.

        Args:
            form: The files' content.
            source: Where it comes from, for errors.

        Raises:
            CheckpointError: If it is another adapter than this one.
        """
        self.load(convert.from_peft(form, self.targets, source), source)

    def detach(self) -> Phi3ForCausalLM:
        """Take the adapter out of the model again, and return it, every weight as it was."""
        for layer in self._layers():
            loralib_layers.restore(layer)
        return self._model
