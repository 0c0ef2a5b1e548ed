"""LoRA by PEFT, injected in place: the model keeps its class and its module paths."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn
from transformers import Phi3ForCausalLM
from transformers.modeling_utils import local_torch_dtype

from phi3_lightning.adapters import convert, modules_to_save, peft_patches, targets
from phi3_lightning.adapters.adapter import PeftForm, Role
from phi3_lightning.adapters.targets import Target
from phi3_lightning.config import LoRA
from phi3_lightning.errors import ModelError

ADAPTER = "default"
"""The name under which PEFT keeps the one adapter."""

FROZEN = (".base_layer", ".original_module")
"""What PEFT inserts into the name of a frozen parameter: in an adapted layer, and beside a copy that is trained."""

ROLES: dict[str, Role] = {
    ".lora_A.": "lora_A",
    ".lora_B.": "lora_B",
    ".lora_embedding_": "embedding",
    ".lora_magnitude_vector.": "magnitude",
    ".modules_to_save.": "modules_to_save",
}
"""What PEFT inserts into the name of a trained parameter."""


class PeftAdapter:
    """LoRA layers of PEFT on a model.

    The adapter's weights are float32 whatever the type of the base and of torch's default: steps of the size that LoRA
    takes are lost in bfloat16. Target layers are replaced in place; base weights are never written.
    """

    def __init__(self, model: Phi3ForCausalLM, config: LoRA) -> None:
        self.targets = targets.resolve(model, config)
        """The adapted layers."""
        self.modules_to_save = modules_to_save.find_modules(model, config, self.targets)
        """Paths of the modules that are trained in full beside them."""
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
            modules_to_save=self.modules_to_save or None,
            task_type=config.task_type,
        )
        lora._register_custom_module({nn.Linear: peft_patches.make_linear})  # type: ignore[dict-item]
        with local_torch_dtype(torch.float32), warnings.catch_warnings():
            # of a tied weight only the input side is adapted, which is what is meant
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            self._tuner = LoraModel(model, {ADAPTER: lora}, ADAPTER)
        for layer in self._layers():
            peft_patches.patch_layer(layer, ADAPTER)
            if orthogonal:
                peft_patches.start_orthogonal(layer, ADAPTER)
        for path in self.modules_to_save:
            modules_to_save.in_float32(self._copy_of(path))

    def _layers(self) -> Iterator[Any]:
        return (module for module in self._tuner.model.modules() if isinstance(module, LoraLayer))

    def _copy_of(self, path: str) -> nn.Module:
        return cast("Any", self._tuner.model).get_submodule(path).modules_to_save[ADAPTER]  # type: ignore[no-any-return]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable parameters of the adapter."""
        trained = [*self._layers(), *map(self._copy_of, self.modules_to_save)]
        return (parameter for module in trained for parameter in module.parameters() if parameter.requires_grad)

    @staticmethod
    def base_name(name: str) -> str:
        """Return the name that a frozen parameter has in the base model."""
        for insert in FROZEN:
            name = name.replace(insert, "")
        return name

    @staticmethod
    def role(name: str) -> Role | None:
        """Return what a parameter is in the adapter; None where it is no part of it."""
        return next((role for insert, role in ROLES.items() if insert in name), None)

    def lora_AB(self, target: Target) -> tuple[nn.Parameter, nn.Parameter]:
        """Return the live ``A`` and ``B`` of a layer, shapes (rank, in) and (rows, rank)."""
        layer = cast("Any", self._tuner.model).get_submodule(target.path)
        if target.embedding:
            return layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
        return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the adapter off, so that the model computes what its base does, while the context lasts."""
        self._tuner.disable_adapter_layers()
        try:
            yield
        finally:
            self._tuner.enable_adapter_layers()

    def _tensors(self) -> dict[str, Tensor]:
        tuner: Any = self._tuner  # PEFT takes any model that has a peft_config
        state = get_peft_model_state_dict(tuner, adapter_name=ADAPTER, save_embedding_layers=False)
        return {f"base_model.{name}": tensor for name, tensor in state.items()}

    def to_peft(self) -> PeftForm:
        """Return the adapter in the form of PEFT's files, with one rank and one scale for all layers."""
        config = replace(cast("LoraConfig", self._tuner.peft_config[ADAPTER]), target_modules=self._names)
        tensors = {name: convert.to_cpu_float32(tensor) for name, tensor in self._tensors().items()}
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
        """Set each ``A`` to its layer's first directions, shape (at least the rank, in), by the layer's path."""
        for target in self.targets:
            if target.path in directions:
                layer: Any = self._tuner.model.get_submodule(target.path)
                layer.lora_A[ADAPTER].weight.copy_(directions[target.path][: target.r])

    def load_peft(self, form: PeftForm, source: str) -> None:
        """Set the adapter to the content of PEFT's files; errors name their ``source``."""
        convert.check_tensors(form.tensors, self._tensors(), source)
        for target in self.targets:
            convert.check_scaling(form.config, target, source)
        tuner: Any = self._tuner
        set_peft_model_state_dict(
            tuner, {name.removeprefix("base_model."): tensor for name, tensor in form.tensors.items()}, ADAPTER
        )

    def detach(self) -> Phi3ForCausalLM:
        """Remove the adapter's layers from the model and return it, every weight as it was."""
        model: Any = self._tuner.model
        for path in self.modules_to_save:
            model.set_submodule(path, model.get_submodule(path).original_module)  # PEFT would leave the trained copy
        return cast("Phi3ForCausalLM", self._tuner.unload())
