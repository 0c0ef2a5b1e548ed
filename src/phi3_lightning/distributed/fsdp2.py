"""FSDP2 for a frozen base with adapters, on Lightning's ModelParallelStrategy."""

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from phi3_lightning.checkpoint.identity import plain_name
from phi3_lightning.checkpoint.mixin import TrainableStateMixin
from phi3_lightning.config import LoRA, Objective
from phi3_lightning.config import Optimizer as OptimizerConfig
from phi3_lightning.config.checks import require
from phi3_lightning.distributed.sharding import Sharding, distribute_like, reshard_all
from phi3_lightning.errors import ConfigError

REMEDY = "use ddp where the base fits on one device, and class_path: phi3_lightning.FSDP2Strategy where it does not"


def check_strategy(strategy: Strategy) -> None:
    """Refuse FSDP1, DeepSpeed and others that would move or save the frozen base, or gather it on one rank."""
    foreign = isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy)
    if foreign or isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ConfigError(f"trainer.strategy: {type(strategy).__name__} is not supported: {REMEDY}")


def check_launcher(strategy: Strategy) -> None:
    """Refuse processes that share nothing with this one, as of ``ddp_spawn``: the command line cannot be sent."""
    launcher = strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher) and not launcher.is_interactive_compatible:
        raise ConfigError(
            "trainer.strategy: ddp_spawn and forkserver send all objects to new processes, and parsers and consoles "
            "cannot be sent; use ddp, which starts this command once for each device"
        )


def check_shardable(
    loaded: bool,
    quantization: str | None,
    lora: LoRA,
    optimizer: OptimizerConfig,
    objective: Objective = Objective(),
) -> None:
    """Refuse options that cannot work on a base whose shards are read after the adapter is attached."""
    later = "it begins with the base's weights, which FSDP2 reads later;"
    start = lora.init_lora_weights
    for allowed, key, value, reason in (
        (not loaded, "base", "a loaded model", "a rank of FSDP2 reads only what it keeps; give its folder, or"),
        (quantization is None, "quantization", quantization, "FSDP2 shards the rows of plain weights;"),
        (not lora.use_dora, "lora.use_dora", lora.use_dora, later),
        (not lora.modules_to_save, "lora.modules_to_save", lora.modules_to_save, later),
        (start != "eva", "lora.init_lora_weights", start, "ranks would gather layers out of step;"),
        (
            not (objective.has_reference and lora.starts_with_effect),
            "objective.name",
            objective.name,
            "its reference is a copy of the adapter that the run starts from, and FSDP2 computes with its own shards;",
        ),
        (optimizer.name == "adamw", "optimizer.name", optimizer.name, "bitsandbytes takes no shards;"),
        (
            optimizer.class_path is None,
            "optimizer.class_path",
            optimizer.class_path,
            "FSDP2 stores a state of two moments with the shapes of the weights, which is AdamW's;",
        ),
    ):
        require(allowed, f"model.{key}", value, f"{reason} use trainer.strategy: ddp")


class FSDP2Strategy(ModelParallelStrategy):
    """Shards the frozen base over all ranks, and reads and writes checkpoints of the adapter alone.

    A checkpoint is one file, as any other strategy writes it: an adapter has 100 to 300 MB. Use the strategy where the
    base does not fit on one device; where it does, ``ddp`` sends less.

    Args:
        reshard_after_forward: Free a layer's weights after its forward pass and gather them again for the backward
            pass. false: keep them until then, which sends half as much and holds the full base meanwhile.
        cpu_offload: Keep weights, gradients and optimiser state in the host's memory, and bring a layer to the GPU
            when it runs.
        process_group_backend: Backend of torch.distributed; null: nccl on GPUs, gloo on CPUs and for what is offloaded.
        timeout: How long a rank waits for another before it gives up.
        save_distributed_checkpoint: Refused: a checkpoint is one file.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        save_distributed_checkpoint: bool = False,
    ) -> None:
        require(
            not save_distributed_checkpoint,
            "trainer.strategy.save_distributed_checkpoint",
            True,
            "a checkpoint is one file, since an adapter has 100 to 300 MB; leave it out",
        )
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload

    def sharding(self) -> Sharding:
        """Return how a model is to be sharded; known once the processes have found each other."""
        return Sharding(
            self.device_mesh["data_parallel"], self.root_device, self.reshard_after_forward, self.cpu_offload
        )

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @override
    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        # NCCL exchanges nothing that is in the host's memory
        return "cpu:gloo,cuda:nccl" if self.cpu_offload and backend == "nccl" else backend

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        if not self.cpu_offload:
            super().model_to_device()
            return
        for module in self.model.children():
            if not any(isinstance(child, FSDPModule) for child in module.modules()):
                module.to(self.root_device)
        cast("pl.LightningModule", self.model)._device = self.root_device

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        reshard_all(cast("torch.nn.Module", self.model))

    @override
    def on_validation_end(self) -> None:
        reshard_all(cast("torch.nn.Module", self.model))  # the last layer and the head, which no backward pass frees

    @override
    def on_test_end(self) -> None:
        reshard_all(cast("torch.nn.Module", self.model))

    @override
    def on_predict_end(self) -> None:
        reshard_all(cast("torch.nn.Module", self.model))

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what training can change, in full on rank 0 alone; the base is not gathered."""
        options = StateDictOptions(
            full_state_dict=True,
            cpu_offload=True,
            # a TrainableStateMixin has left them out, and torch fails where they are missing
            ignore_frozen_params=not isinstance(self.lightning_module, TrainableStateMixin),
        )
        return get_model_state_dict(cast("torch.nn.Module", self.model), options=options)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = cast("pl.LightningModule", self.lightning_module)
        parameters = {plain_name(name): parameter for name, parameter in module.named_parameters()}
        shares = {
            name: distribute_like(tensor, parameters.get(plain_name(name), tensor))
            for name, tensor in checkpoint["state_dict"].items()
        }
        module.load_state_dict(shares, strict=strict)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimiser as torch's own and any other strategy has it, in full on rank 0 alone."""
        state = optimizer.state_dict()
        gathered = {
            index: {name: v.full_tensor().cpu() if isinstance(v, DTensor) else v for name, v in values.items()}
            for index, values in state["state"].items()
        }
        return {**state, "state": gathered} if self.is_global_zero else {}

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            shares = {
                index: {
                    key: distribute_like(value, parameters[index]) if isinstance(value, Tensor) else value
                    for key, value in values.items()
                }
                for index, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shares})
            if not self.cpu_offload:
                _optimizer_to_device(optimizer, self.root_device)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        path = Path(self.broadcast(os.fspath(filepath)))
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(os.fspath(checkpoint_path)))
        return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
