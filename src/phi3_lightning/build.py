"""How a module's model is made from base, adapter and shards, and how it is taken apart again.

It stands at the top of the package because ``model/`` and ``adapters/`` never import each other.
"""

import copy
from dataclasses import dataclass, fields
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelPruning
from torch.distributed.tensor import DTensor
from transformers import Phi3Config, Phi3ForCausalLM

from phi3_lightning import adapters
from phi3_lightning.adapters.adapter import Adapter
from phi3_lightning.checkpoint import averaging
from phi3_lightning.config import LoRA, Objective, Optimizer
from phi3_lightning.config.checks import require_choice
from phi3_lightning.distributed.fsdp2 import FSDP2Strategy, check_shardable, check_strategy
from phi3_lightning.distributed.sharding import Sharding, build_placeholder_model, load_sharded_weights, shard
from phi3_lightning.errors import CheckpointError, ConfigError, ModelError, Phi3LightningError
from phi3_lightning.hardware import check_accelerator
from phi3_lightning.model import base as base_model
from phi3_lightning.model import int8_dynamic, packed_attention
from phi3_lightning.model.activation_checkpointing import Checkpointing, check_device, checkpoint_activations, mode_of
from phi3_lightning.model.compile import Compilation, choose_compilation, uncompile_layers
from phi3_lightning.model.precision import check_precision
from phi3_lightning.optim import check_optimizer
from phi3_lightning.planning.spec import RunSpec


@dataclass(frozen=True)
class Base:
    """The frozen base of a module, by its options; :class:`~phi3_lightning.Phi3LoRAModule` describes them."""

    name: str
    """The option ``base``; of a loaded model the name that it has itself."""
    base_id: str | None
    revision: str | None
    init: base_model.Initialisation
    dtype: base_model.DType
    attn_implementation: base_model.Attention
    quantization: base_model.Quantization | None
    loaded: Phi3ForCausalLM | None = None
    """The model itself, where a script has loaded it."""

    def __post_init__(self) -> None:
        """Refuse values that are not among the choices."""
        require_choice("model.init", self.init, base_model.Initialisation)
        require_choice("model.dtype", self.dtype, base_model.DType)
        require_choice("model.attn_implementation", self.attn_implementation, base_model.Attention)
        if self.quantization is not None:
            require_choice("model.quantization", self.quantization, base_model.Quantization)

    def config(self) -> Phi3Config:
        """Return a configuration of the base that is the caller's own."""
        if self.loaded is None:
            return base_model.read_config(self.name, self.revision)
        return copy.deepcopy(self.loaded.config)

    def hyper_parameters(self) -> dict[str, Any]:
        """Return the options of the module that name the base, as plain types."""
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "loaded"}
        return {"base": options.pop("name"), **options}

    def spec(self, lora: LoRA, optimizer: Optimizer, mode: Checkpointing, objective: Objective) -> RunSpec:
        """Return what decides how much memory and time training takes, without a Trainer."""
        config = self.config()
        kernel = self.attn_implementation if self.loaded is None else config._attn_implementation
        return RunSpec(
            base=self.name,
            config=config,
            dtype=self.dtype,
            attn_implementation=kernel if kernel in get_args(base_model.Attention) else "auto",
            quantization=self.quantization,
            lora=lora,
            optimizer=optimizer,
            gradient_checkpointing=mode,
            objective=objective,
        )

    def check(self, lora: LoRA) -> None:
        """Raise what :func:`build` would raise, without loading a weight."""
        model = base_model.skeleton(self.config()) if self.loaded is None else self.loaded
        adapters.check(model, lora, base=self.base_id)

    def load(self, device: torch.device) -> Phi3ForCausalLM:
        """Return the model with its weights."""
        if self.loaded is not None:
            return self.loaded
        return base_model.load(
            self.name,
            revision=self.revision,
            init=self.init,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            quantization=self.quantization,
            device=device,
        )

    def placeholder(self, device: torch.device) -> Phi3ForCausalLM:
        """Return the model without its weights, to be sharded."""
        attention = base_model.choose_attention(self.attn_implementation, device)
        return build_placeholder_model(self.config(), getattr(torch, self.dtype), attention, device)


def check_trainer(trainer: pl.Trainer, mode: Checkpointing, base: Base, optimizer: Optimizer, stage: str) -> None:
    """Refuse a device, a strategy, a precision or an optimiser that cannot train the adapter."""
    device = trainer.strategy.root_device.type
    check_accelerator(device)
    check_strategy(trainer.strategy)
    check_device(mode, device)
    if base.quantization == "int8_dynamic":
        int8_dynamic.check_device(device)
    check_precision(trainer.precision, base.dtype, fitting=stage == "fit")
    if stage == "fit":
        check_callbacks(trainer)
        check_optimizer(optimizer)


def check_callbacks(trainer: pl.Trainer) -> None:
    """Refuse callbacks of Lightning that change what the run is planned with, or find nothing to work on."""
    reasons = {
        GradientAccumulationScheduler: "changes the number of optimiser steps, over which model.schedule is spread at "
        "the start; use trainer.accumulate_grad_batches",
        ModelPruning: "looks for weights that are called weight, and those of an adapter are not; use a smaller "
        "model.lora.r",
    }
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, reason in reasons.items():
            if isinstance(callback, kind):
                raise ConfigError(f"trainer.callbacks: {type(callback).__name__} {reason}")


def sharding_of(
    trainer: pl.Trainer | None, base: Base, lora: LoRA, optimizer: Optimizer, objective: Objective
) -> Sharding | None:
    """Return how a Trainer spreads the base over its ranks; None where each rank holds all of it."""
    if trainer is None or not isinstance(trainer.strategy, FSDP2Strategy):
        return None
    check_shardable(base.loaded is not None, base.quantization, lora, optimizer, objective)
    averaging.check_averaging(trainer)  # averaging callbacks ask for the model before setup
    return trainer.strategy.sharding()


def build(
    base: Base, lora: LoRA, mode: Checkpointing, device: torch.device, sharding: Sharding | None
) -> tuple[Phi3ForCausalLM, Adapter, str]:
    """Return the frozen base in training mode, its adapter, and the fingerprint of its weights.

    A model that a script has loaded stays as it was where the adapter is refused.
    """
    base.check(lora)
    model = base.load(device) if sharding is None else base.placeholder(sharding.device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        adapter = adapters.attach(model.requires_grad_(False), lora, base=base.base_id)
        fingerprint = _prepare_for_training(model, adapter, base, lora, mode, sharding)
    except Phi3LightningError:
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    return model.train(), adapter, fingerprint


def _prepare_for_training(
    model: Phi3ForCausalLM, adapter: Adapter, base: Base, lora: LoRA, mode: Checkpointing, sharding: Sharding | None
) -> str:
    base_model.keep_as_quantized(model)
    # a callback decides what 'auto' is, once the batches are known
    checkpoint_activations(model, "full" if mode == "auto" else mode)
    if sharding is not None:
        shard(model, sharding)
        load_sharded_weights(model, sharding, base.init, base.name, base.revision, adapter.base_name)
    fingerprint = base_model.fingerprint(model, adapter.base_name)
    try:
        adapters.check_origin(lora, base.base_id, base.revision, fingerprint)
    except CheckpointError:
        if sharding is None:
            detach(model, adapter)
        raise
    return fingerprint


def describe_training(model: Phi3ForCausalLM, trainer: pl.Trainer, compilation: Compilation, *, dora: bool) -> str:
    """Compile the layers of a model or not, in the present autocast context, and describe how it trains."""
    micro_batches = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
    layers = choose_compilation(model, compilation, micro_batches, dora=dora)
    attention = packed_attention.describe(model)
    return f"attention: {attention}; layers: {layers}; gradient checkpointing: {mode_of(model)}"


def detach(model: Phi3ForCausalLM, adapter: Adapter) -> Phi3ForCausalLM:
    """Return the base without its adapter, bit-identical to what was loaded."""
    if any(isinstance(parameter, DTensor) for parameter in adapter.parameters()):
        raise ModelError("detach_adapter: FSDP2 has sharded the base; load the checkpoint on one process for it")
    checkpoint_activations(model, "none")
    uncompile_layers(model)
    return adapter.detach()
