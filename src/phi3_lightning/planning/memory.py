"""The most memory that a run needs on one device, by part."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import lightning.pytorch as pl
import psutil
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from phi3_lightning.model.base import Quantization
from phi3_lightning.model.checkpointing import Way, way_of
from phi3_lightning.model.loss import CHUNK, GPU_CHUNK
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

PROCESS = 1.0e9
"""Bytes of Python and its libraries on a CPU before there is a model, at the most."""
LOADED = 0.1e9
"""Bytes that libraries load in a CPU's first step."""
HOLES = 0.2
"""What a CPU's heap leaves between tensors: this share of what is alive at the peak. Calibrated (docs/plan.md)."""
HOLES_OF_ALL = 0.15
"""As much again of what would be alive if nothing were recomputed, since whatever is made once leaves a hole."""
MOST_HOLES = 0.6e9
"""Bytes of the second share at the most."""


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
    """What the allocator of a CPU cannot use, and what libraries load in the first step."""

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
        """Return what a run has; a CPU's process is left out, since it may hold the model by now.

        Args:
            trainer: The run's.
            module: The module that it trains.
        """
        strategy = trainer.strategy
        return cls(
            module.unloaded() if module.model is None else module.unloaded(gradient_checkpointing=way_of(module.model)),
            mixed=isinstance(trainer.precision_plugin, MixedPrecision),
            ranks=trainer.world_size,
            sharded=isinstance(strategy, FSDP2Strategy),
            process=None if strategy.root_device.type == "cuda" else 0.0,
        )

    @cached_property
    def hollow(self) -> Hollow:
        """The module without values; a ModelError where the base is none, or cannot carry the adapter."""
        return Hollow(self.module)

    @property
    def way(self) -> Way | int:
        """What is computed again in the backward pass; all of it where that is still to be decided."""
        wanted = self.module.gradient_checkpointing
        return "full" if wanted == "auto" else wanted

    def usual(self) -> Self:
        """Return the run with a round figure for a CPU's process, the same each time."""
        return self if self.process is None else replace(self, process=PROCESS)

    def changed(self, **changes: Any) -> Self:
        """Return the run with other arguments of its module.

        Args:
            **changes: The arguments.
        """
        return replace(self, module=self.module.unloaded(**changes))

    def memory(self, shape: Shape, way: Way | int | None = None) -> Memory:
        """Predict the peak of a run whose largest micro-batch is given.

        Args:
            shape: Its size.
            way: What is computed again in the backward pass; None: as the module is configured.
        """
        on_gpu = self.process is None
        model, config = self.hollow.model, self.module.optimizer_config
        frozen = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.requires_grad]
        trained = sum(parameter.numel() for parameter in self.hollow.module.trained_parameters())
        made = self.hollow.activations(shape, way or self.way, mixed=self.mixed)
        everything = 0 if on_gpu else self.hollow.activations(shape, "none", mixed=self.mixed).peak
        moments = 2 if config.name == "paged_adamw_8bit" else 8  # two, in 8 bits or float32
        buckets = 4 if self.ranks > 1 and not self.sharded else 0  # of DistributedDataParallel
        memory = Memory(
            base=sum(map(_bytes, frozen)),
            adapter=(8 + buckets) * trained,
            optimizer=moments * trained,
            kept=made.kept,
            head=made.head * (_chunks_of_a_gpu(shape.supervised) if on_gpu else 1),
            layer=made.layer,
            process=DRIVER if self.process is None else self.process,
            holes=0 if on_gpu else LOADED + HOLES * made.peak + min(HOLES_OF_ALL * everything, MOST_HOLES),
        )
        if self.module.quantization is not None:
            memory = quantized(memory, model, self.module.quantization)
        return sharded(memory, model, self.ranks) if self.sharded else memory


def _chunks_of_a_gpu(supervised: int) -> float:
    """How many times more positions a GPU's head takes at once than the dry run's, which is a CPU's."""
    return min(GPU_CHUNK, supervised) / min(CHUNK, supervised) if supervised else 1.0


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
    return replace(memory, base=memory.base / ranks, head=memory.head + units, layer=memory.layer + units, **shares)


def resident() -> float:
    """Return the bytes of memory that this process has now."""
    return float(psutil.Process().memory_info().rss)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
