"""A training step by the module's own code, on a batch of which the size alone matters."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Self

import torch

from phi3_lightning import adapters
from phi3_lightning.batch import IGNORE_INDEX, Batch
from phi3_lightning.model import base as base_model
from phi3_lightning.model import loss
from phi3_lightning.model.documents import DOCUMENTS
from phi3_lightning.module import Phi3LoRAModule


@dataclass(frozen=True)
class Shape:
    """The size of a micro-batch."""

    lengths: list[list[int]]
    """Tokens of each document, row by row."""
    supervised: int
    """Tokens that have a label."""

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """Return the size of a batch.

        Args:
            batch: The batch.
        """
        return cls(batch["lengths"], int((batch["labels"] != IGNORE_INDEX).sum()))

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(map(sum, self.lengths))


def without_values(configured: Phi3LoRAModule, layers: int | None = None) -> Phi3LoRAModule:
    """Return a module with its adapter, all of it on the meta device, in training mode, that recomputes nothing.

    Args:
        configured: The module as it is configured, not loaded.
        layers: Decoder layers; None: as many as the base has.

    Raises:
        ModelError: If the base is no ``Phi3ForCausalLM``, or a target names no layer of it.
    """
    config = configured.base_config()
    config.num_hidden_layers = layers or config.num_hidden_layers
    wanted = configured.attn_implementation
    attention = DOCUMENTS if wanted in ("auto", "flash_attention_2") else wanted
    model = base_model.skeleton(config, getattr(torch, configured.dtype_name), attention)
    lora = replace(configured.lora, adapter=None, init_lora_weights=True)  # about values, of which there are none
    adapter = adapters.attach(model, lora)
    model.model.rotary_emb.rope_type = "default"  # longrope looks at positions; its angles have the same shape
    module = configured.unloaded(lora=lora, neftune_noise_alpha=None)
    module.model, module.adapter = model.train(), adapter
    return module


def take_step(
    module: Phi3LoRAModule,
    shape: Shape,
    *,
    mixed: bool,
    device: str = "cpu",
    on_phase: Callable[[], None] = lambda: None,
) -> None:
    """Run forward pass, loss and backward pass.

    Args:
        module: With a model, on ``device``.
        shape: The size of the micro-batch.
        mixed: Whether the Trainer's precision is a mixed one, in 16 bits.
        device: Type of the device.
        on_phase: Called after the layers' forward pass, after the loss, and after the backward pass.
    """
    places = len(shape.lengths), max(map(sum, shape.lengths))
    zeros = torch.zeros(places, dtype=torch.int64, device=device)
    batch = Batch(input_ids=zeros, labels=zeros, position_ids=zeros, lengths=shape.lengths, row_ids=[])
    with torch.autocast(device, torch.bfloat16) if mixed else nullcontext(), module.autocast():
        hidden = module(batch)
        on_phase()
        # as many as are supervised; which ones is a question of values
        states = hidden.flatten(0, 1).index_select(0, torch.arange(shape.supervised, device=device))
        loss_sum = loss.summed_loss(states, zeros.flatten()[: shape.supervised], module.head)
    del hidden, states
    on_phase()
    loss_sum.backward()
    on_phase()
