"""LoRA by PEFT, injected in place: the model keeps its class and its module paths."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn
from transformers import Phi3ForCausalLM

from phi3_lightning.adapters import convert, modules_to_save, peft_patches, targets
from phi3_lightning.adapters.adapter import PeftForm
from phi3_lightning.adapters.targets import Target
from phi3_lightning.config import LoRA
from phi3_lightning.errors import ModelError

ADAPTER = "default"
"""The name under which PEFT keeps the one adapter."""


class PeftAdapter:
    """LoRA layers of PEFT on a model.

    The adapter's weights are float32 whatever the type of the base and of torch's default: updates of the size that
    LoRA makes are lost in bfloat16. Base weights are never written.

    Args:
        model: The frozen base model; its target layers are replaced in place.
        config: Rank, scale, dropout and targets.

    Raises:
        ModelError: If a target does not exist in ``model``, or cannot be trained.
    """

    def __init__(self, model: Phi3ForCausalLM, config: LoRA) -> None:
        self.targets = targets.resolve(model, config)
        """The adapted layers."""
        self.trained_whole = modules_to_save.resolve(model, config, self.targets)
        """Paths of the modules that are trained whole beside them."""
        paths = [target.path for target in self.targets]
        in_8_bits = any(model.get_submodule(path).weight.dtype == torch.int8 for path in paths)
        if config.use_dora and in_8_bits:  # PEFT reads the weights to measure them, and the layers lose their scales
            raise ModelError("model.lora.use_dora: DoRA cannot measure a base in 8 bits; set model.quantization: nf4")
        self._names = targets.short_names(model, paths)
        orthogonal, eva = (config.init_lora_weights == start for start in ("orthogonal", "eva"))
        lora = LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT computes with floats as well
            lora_dropout=config.lora_dropout,
            target_modules=paths,
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern=dict(config.alpha_pattern),
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            init_lora_weights=True if orthogonal or eva else config.init_lora_weights,  # type: ignore[arg-type]
            modules_to_save=self.trained_whole or None,
            task_type=config.task_type,
        )
        with peft_patches.float32_default(), peft_patches.tied_input_is_meant():
            self._tuner = LoraModel(model, {ADAPTER: lora}, ADAPTER)
        for layer in self._layers():
            peft_patches.patch_layer(layer, ADAPTER)
            if orthogonal:
                peft_patches.start_orthogonal(layer, ADAPTER)
        for path in self.trained_whole:
            modules_to_save.in_float32(self._copy_of(path))

    def _layers(self) -> Iterator[Any]:
        return (module for module in self._tuner.model.modules() if isinstance(module, LoraLayer))

    def _copy_of(self, path: str) -> nn.Module:
        return cast("Any", self._tuner.model).get_submodule(path).modules_to_save[ADAPTER]  # type: ignore[no-any-return]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable parameters of the adapter."""
        trained = [*self._layers(), *map(self._copy_of, self.trained_whole)]
        return (parameter for module in trained for parameter in module.parameters() if parameter.requires_grad)

    def lora_AB(self, target: Target) -> tuple[nn.Parameter, nn.Parameter]:
        """Return the live ``A`` and ``B`` of a layer, shapes (rank, in) and (rows, rank)."""
        layer = cast("Any", self._tuner.model).get_submodule(target.path)
        if target.embedding:
            return layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
        return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the model answer as its base does, while the context lasts."""
        self._tuner.disable_adapter_layers()
        try:
            yield
        finally:
            self._tuner.enable_adapter_layers()

    def _tensors(self) -> dict[str, Tensor]:
        tuner: Any = self._tuner  # PEFT takes any model that has a peft_config
        found = get_peft_model_state_dict(tuner, adapter_name=ADAPTER, save_embedding_layers=False)
        return {f"base_model.{name}": tensor for name, tensor in found.items()}

    def to_peft(self) -> PeftForm:
        """Return the adapter in the form of PEFT's files, with one rank and one scale for all layers."""
        config = copy.copy(cast("LoraConfig", self._tuner.peft_config[ADAPTER]))
        config.target_modules = self._names
        tensors = {name: convert.on_cpu(tensor) for name, tensor in self._tensors().items()}
        if not (config.rank_pattern or config.alpha_pattern):
            return PeftForm(config, tensors)
        state = {
            f"{target.path}.lora_{half}": tensors[key]
            for target in self.targets
            for half, key in zip("AB", convert.peft_keys(target), strict=True)
        }
        flat = convert.to_peft(state, self.targets, self._names)
        config.r, config.lora_alpha = flat.config.r, flat.config.lora_alpha
        config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False
        return PeftForm(config, tensors | flat.tensors)

    @torch.no_grad()
    def set_lora_A(self, directions: Mapping[str, Tensor]) -> None:
        """Set each ``A`` to its layer's first directions.

        Args:
            directions: By the layer's path, shape (at least the rank, in); layers that are not named stay as they are.
        """
        for target in self.targets:
            if target.path in directions:
                layer: Any = self._tuner.model.get_submodule(target.path)
                layer.lora_A[ADAPTER].weight.copy_(directions[target.path][: target.r])

    def load_peft(self, form: PeftForm, source: str) -> None:
        """Set the adapter to what PEFT's files hold.

        Args:
            form: The files' content.
            source: Where it comes from, for errors.

        Raises:
            CheckpointError: If it is another adapter than this one.
        """
        convert.check_tensors(form.tensors, self._tensors(), source)
        for target in self.targets:
            convert.check_scaling(form.config, target, source)
        tuner: Any = self._tuner
        set_peft_model_state_dict(
            tuner, {name.removeprefix("base_model."): tensor for name, tensor in form.tensors.items()}, ADAPTER
        )

    def detach(self) -> Phi3ForCausalLM:
        """Take the adapter's layers out of the model again.

        Returns:
            The base model, every weight as it was.
        """
        model: Any = self._tuner.model
        for path in self.trained_whole:
            model.set_submodule(path, model.get_submodule(path).original_module)  # PEFT would leave the trained copy
        return cast("Phi3ForCausalLM", self._tuner.unload())
