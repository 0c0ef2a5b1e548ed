"""LoRA by PEFT, injected in place: the model keeps its class and its module paths."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from transformers import Phi3ForCausalLM

from phi3_lightning.adapters import targets
from phi3_lightning.adapters.adapter import PeftForm
from phi3_lightning.config import LoRA

ADAPTER = "default"
"""The name under which PEFT keeps the one adapter."""


class _WithoutAutocast:
    """True where PEFT must cast a layer's input to float32 itself.

    Under autocast the small weights are cast to the activations' type, and casting the activations first would be
    a round trip for nothing.
    """

    def __bool__(self) -> bool:
        return not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"))


class PeftAdapter:
    """LoRA layers of PEFT on a model.

    The adapter's weights are float32 whatever the type of the base and of torch's default: updates of the size that
    LoRA makes are lost in bfloat16. Base weights are never written.

    Args:
        model: The frozen base model; its target layers are replaced in place.
        config: Rank, scale, dropout and targets.

    Raises:
        ModelError: If a target does not exist in ``model``.
    """

    def __init__(self, model: Phi3ForCausalLM, config: LoRA) -> None:
        self.targets = targets.resolve(model, config.target_modules)
        """Paths of the adapted layers."""
        lora = LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT computes with floats as well
            lora_dropout=config.lora_dropout,
            target_modules=self.targets,
            use_rslora=config.use_rslora,
            bias=config.bias,
            task_type=config.task_type,
        )
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            self._tuner = LoraModel(model, {ADAPTER: lora}, ADAPTER)
        finally:
            torch.set_default_dtype(default)
        for parameter in self.parameters():
            parameter.data = parameter.data.float()
        for layer in self._layers():
            layer.cast_input_dtype_enabled = cast("bool", _WithoutAutocast())

    def _layers(self) -> Iterator[Any]:
        return (module for module in self._tuner.model.modules() if isinstance(module, LoraLayer))

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the trainable parameters of the adapter."""
        return (parameter for layer in self._layers() for parameter in layer.parameters() if parameter.requires_grad)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the model answer as its base does, while the context lasts."""
        self._tuner.disable_adapter_layers()
        try:
            yield
        finally:
            self._tuner.enable_adapter_layers()

    def to_peft(self) -> PeftForm:
        """Return the adapter in the form of PEFT's files."""
        tuner: Any = self._tuner  # PEFT takes any model that has a peft_config
        found = get_peft_model_state_dict(tuner, adapter_name=ADAPTER, save_embedding_layers=False)
        tensors = {f"base_model.{name}": tensor.detach().float().cpu().clone() for name, tensor in found.items()}
        return PeftForm(cast("LoraConfig", self._tuner.peft_config[ADAPTER]), tensors)

    def detach(self) -> Phi3ForCausalLM:
        """Take the adapter's layers out of the model again.

        Returns:
            The base model, every weight as it was.
        """
        return cast("Phi3ForCausalLM", self._tuner.unload())
