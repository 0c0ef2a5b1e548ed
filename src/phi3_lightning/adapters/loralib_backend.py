"""LoRA by loralib: its layers in place of the frozen ones, each slice of a fused layer on its own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import loralib
import torch
from torch import Tensor, nn
from transformers import Phi3ForCausalLM

from phi3_lightning.adapters import convert, loralib_layers, targets
from phi3_lightning.adapters.adapter import PeftForm, Role
from phi3_lightning.adapters.targets import Target
from phi3_lightning.config import LoRA


class LoralibAdapter:
    """LoRA layers of loralib on a model.

    The target layers become loralib's, in place. The adapter's weights are float32 whatever the type of the base and
    of torch's default. Base weights are never written, and keep their names: ``qkv_proj.weight`` beside
    ``qkv_proj.lora_A`` and ``qkv_proj.lora_B``.
    """

    modules_to_save: list[str] = []
    """loralib trains no module in full."""

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

    @staticmethod
    def base_name(name: str) -> str:
        """Return the name that a frozen parameter has in the base model, which loralib's layers keep."""
        return name

    @staticmethod
    def role(name: str) -> Role | None:
        """Return what a parameter is in the adapter; None where it is no part of it."""
        path, _, last = name.rpartition(".")
        if last not in ("lora_A", "lora_B"):
            return None
        return "embedding" if path.endswith("embed_tokens") else cast("Role", last)

    def lora_AB(self, target: Target) -> tuple[nn.Parameter, nn.Parameter]:
        """Return the live ``A`` and ``B`` of a layer: of each adapted slice, one below the other."""
        layer: Any = self._model.get_submodule(target.path)
        return layer.lora_A, layer.lora_B

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the adapter off, so that the model computes what its base does, while the context lasts."""
        for layer in self._layers():
            layer.merged = True  # loralib's flag for a layer that adds nothing; none ever merges
        try:
            yield
        finally:
            for layer in self._layers():
                layer.merged = False

    def state_dict(self) -> dict[str, Tensor]:
        """Return the adapter in the form of loralib's files."""
        return cast("dict[str, Tensor]", loralib.lora_state_dict(self._model))

    def load(self, state: Mapping[str, Tensor], source: str) -> None:
        """Set the adapter to the content of a loralib file, as :meth:`state_dict` returns it."""
        convert.check_tensors(state, self.state_dict(), source)
        self._model.load_state_dict(state, strict=False)

    def to_peft(self) -> PeftForm:
        """Return the adapter in the form of PEFT's files, with one rank and one scale for all layers."""
        return convert.to_peft(self.state_dict(), self.targets, self._names, self._dropout)

    @torch.no_grad()
    def set_lora_A(self, directions: Mapping[str, Tensor]) -> None:
        """Set ``A`` of each slice to a layer's first directions, shape (at least the rank, in), by the layer's path."""
        for target, layer in zip(self.targets, self._layers(), strict=True):
            if target.path in directions:
                layer.lora_A.copy_(directions[target.path][: target.r].repeat(len(target.adapted), 1))

    def load_peft(self, form: PeftForm, source: str) -> None:
        """Set the adapter to the content of PEFT's files; errors name their ``source``."""
        self.load(convert.from_peft(form, self.targets, source), source)

    def detach(self) -> Phi3ForCausalLM:
        """Remove the adapter's layers from the model and return it, every weight as it was."""
        for layer in self._layers():
            loralib_layers.restore(layer)
        return self._model
