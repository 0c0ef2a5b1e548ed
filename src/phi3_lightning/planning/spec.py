"""What a prediction needs to know of a run."""

from dataclasses import dataclass, replace
from typing import Self

import lightning.pytorch as pl
from lightning.pytorch.plugins import MixedPrecision
from transformers import Phi3Config

from phi3_lightning.config import LoRA, Objective, Optimizer
from phi3_lightning.distributed.fsdp2 import FSDP2Strategy
from phi3_lightning.model.activation_checkpointing import Checkpointing, CheckpointingMode
from phi3_lightning.model.base import Attention, DType, Quantization


@dataclass(frozen=True)
class RunSpec:
    """The properties of a run that decide how much memory and time it takes, besides its rows."""

    base: str
    """Name of the base, for errors."""
    config: Phi3Config
    """Its configuration; nothing of it is changed."""
    dtype: DType
    attn_implementation: Attention
    """The attention kernel as configured; of a loaded model, the one that it has."""
    quantization: Quantization | None
    lora: LoRA
    optimizer: Optimizer
    gradient_checkpointing: Checkpointing
    """What the backward pass recomputes; ``auto`` until that is decided."""
    objective: Objective = Objective()
    """What the batches teach, which may take further forward passes."""
    mixed: bool = False
    """Whether the Trainer's precision is a mixed one, in 16 bits."""
    ranks: int = 1
    """Devices of the run."""
    sharded: bool = False
    """Whether FSDP2 shards weights over them; otherwise each holds all."""
    process: float | None = 0.0
    """Bytes of the process before it has a model; None: on a GPU, where they do not count."""

    @property
    def mode(self) -> CheckpointingMode | int:
        """What the backward pass recomputes; all of it where that is still to be decided."""
        return "full" if self.gradient_checkpointing == "auto" else self.gradient_checkpointing

    @property
    def on_gpu(self) -> bool:
        """Whether the run uses GPUs."""
        return self.process is None

    @property
    def copies_adapter(self) -> bool:
        """Whether the reference is a frozen copy of the adapter."""
        return self.objective.has_reference and self.lora.starts_with_effect

    @property
    def shares_prompts(self) -> bool:
        """Whether the kernel computes once what both answers of a pair begin with."""
        return self.attn_implementation in ("auto", "documents")

    def under(self, trainer: pl.Trainer) -> Self:
        """Return the spec of a run under a Trainer; a CPU's process is left out, since it may hold the model by now."""
        return replace(
            self,
            mixed=isinstance(trainer.precision_plugin, MixedPrecision),
            ranks=trainer.world_size,
            sharded=isinstance(trainer.strategy, FSDP2Strategy),
            process=None if trainer.strategy.root_device.type == "cuda" else 0.0,
        )
