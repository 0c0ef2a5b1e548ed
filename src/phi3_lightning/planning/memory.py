"""The most memory that a run needs on one device, by part."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from phi3_lightning.callbacks.throughput import peak_memory
from phi3_lightning.model.base import Quantization
from phi3_lightning.module import Phi3LoRAModule
from phi3_lightning.planning.dry_run import Hollow
from phi3_lightning.planning.step import Shape
from phi3_lightning.strategy import FSDP2Strategy

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits with double quantisation: an 8-bit scale for 64, a float32 for 256 of those."""
INT8 = 1.0
"""Bytes of a weight in 8 bits; each row has a float32 scale besides."""
DRIVER = 1.0e9
"""Bytes of CUDA's context, its libraries' workspaces and what the allocator cannot use on a GPU. Not measured."""

HOLES = 0.33e9
"""Bytes at the most between allocations that a CPU's allocator cannot use, and what libraries load in the first step.
Calibrated on three runs, not derived; others had up to 0.75 GB (docs/plan.md)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of training."""

    base: float
    """The frozen weights."""
    adapter: float
    """The trained weights, their gradients, and what the strategy needs to sum these."""
    optimizer: float
    """Its moments."""
    kept: float
    """What the forward pass keeps for the backward pass."""
    head: float
    """Logits and their gradients."""
    layer: float
    """A layer's pass, forward or backward. It is over when the head begins, and begins again when that is done."""
    process: float
    """Python and its libraries on a CPU; the driver on a GPU."""
    holes: float
    """What the allocator of a CPU cannot use."""

    @property
    def working(self) -> float:
        """The larger of head and layer."""
        return max(self.head, self.layer)

    @property
    def total(self) -> float:
        """All at the peak."""
        return self.base + self.adapter + self.optimizer + self.kept + self.working + self.process + self.holes


@dataclass(frozen=True)
class Setup:
    """What decides about memory, beside the rows."""

    module: Phi3LoRAModule
    """As it is configured, not loaded."""
    mixed: bool
    """Whether the Trainer's precision is a mixed one, in 16 bits."""
    ranks: int
    """Devices of the run."""
    sharded: bool
    """Whether FSDP2 shards weights over them; otherwise each has all."""
    process: float | None
    """Bytes of the process before it has a model; None: on a GPU, where they do not count."""

    @classmethod
    def of(cls, trainer: pl.Trainer, module: Phi3LoRAModule) -> Self:
        """Return what a run has; a CPU's process is left out, since it holds the model by now.

        Args:
            trainer: The run's.
            module: The module that it trains.
        """
        strategy = trainer.strategy
        return cls(
            Phi3LoRAModule(**{**module.hparams, "lora": module.lora}),
            mixed=isinstance(trainer.precision_plugin, MixedPrecision),
            ranks=trainer.world_size,
            sharded=isinstance(strategy, FSDP2Strategy),
            process=None if strategy.root_device.type == "cuda" else 0.0,
        )

    @cached_property
    def hollow(self) -> Hollow:
        """The module without values; a ModelError where the base is none, or cannot carry the adapter."""
        return Hollow(self.module)

    def memory(self, shape: Shape) -> Memory:
        """Predict the peak of a run whose largest micro-batch is given.

        Args:
            shape: Its size.
        """
        model, config = self.hollow.model, self.module.optimizer_config
        frozen = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.requires_grad]
        trained = sum(parameter.numel() for parameter in self.hollow.module.trained_parameters())
        made = self.hollow.activations(shape, mixed=self.mixed)
        moments = 2 if config.name == "paged_adamw_8bit" else 8  # two, in 8 bits or float32
        buckets = 4 if self.ranks > 1 and not self.sharded else 0  # of DistributedDataParallel
        memory = Memory(
            base=sum(map(_bytes, frozen)),
            adapter=(8 + buckets) * trained,
            optimizer=moments * trained,
            kept=made.kept,
            head=made.head,
            layer=made.layer,
            process=DRIVER if self.process is None else self.process,
            holes=0 if self.process is None else min(HOLES, made.kept + max(made.head, made.layer)),
        )
        if self.module.quantization is not None:
            memory = quantized(memory, model, self.module.quantization)
        return sharded(memory, model, self.ranks) if self.sharded else memory


def quantized(memory: Memory, model: nn.Module, kind: Quantization) -> Memory:
    """Return the memory with the layers' linear weights in 4 or 8 bits; a calculation.

    Args:
        memory: With the weights in full.
        model: The model, of which the head stays as it is.
        kind: How they are kept.
    """
    layers = [part for part in model.get_submodule("model").modules() if isinstance(part, nn.Linear)]
    weights = [layer.weight for layer in layers if not layer.weight.requires_grad]
    full = sum(map(_bytes, weights))
    kept = sum(weight.numel() * NF4 if kind == "nf4" else weight.numel() * INT8 + 4 * len(weight) for weight in weights)
    one = max(map(_bytes, weights))  # is unpacked where it is multiplied
    return replace(memory, base=memory.base - full + kept, layer=memory.layer + one)


def sharded(memory: Memory, model: nn.Module, ranks: int) -> Memory:
    """Return the memory of a rank of FSDP2; a calculation (docs/scaling.md).

    Args:
        memory: With everything on one device.
        model: The model.
        ranks: Devices that share it.
    """
    head, layer = (
        sum(_bytes(tensor) for tensor in model.get_submodule(name).parameters() if not tensor.requires_grad)
        for name in ("lm_head", "model.layers.0")
    )
    # whole at one time: the head, a layer, and the next one's buffer and copy
    units = (head + 3 * layer) if ranks > 1 else 0
    shares = {name: getattr(memory, name) / ranks for name in ("adapter", "optimizer")}
    return replace(memory, base=memory.base / ranks + units, **shares)


def resident() -> float:
    """Return the bytes of memory that this process has now, where the system tells (Linux), or has had at the most."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory(torch.device("cpu"))
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
