"""A training step by the code of a real one, on a batch whose size alone matters."""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from transformers import Phi3ForCausalLM

from phi3_lightning import adapters
from phi3_lightning.batch import IGNORE_INDEX, Batch
from phi3_lightning.model import loss, packed_attention, precision
from phi3_lightning.model.base import skeleton
from phi3_lightning.planning.spec import RunSpec


@dataclass(frozen=True)
class BatchShape:
    """The size of a micro-batch."""

    lengths: list[list[int]]
    """Tokens of each document, row by row."""
    supervised: int
    """Tokens that have a label."""

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """Return the size of a batch."""
        return cls(batch["document_lengths"], int((batch["labels"] != IGNORE_INDEX).sum()))

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(map(sum, self.lengths))


def build_meta_model(spec: RunSpec, layers: int | None = None) -> Phi3ForCausalLM:
    """Return a run's model, or one with fewer layers, with its adapter on the meta device; it recomputes nothing."""
    config = deepcopy(spec.config)
    config.num_hidden_layers = layers or config.num_hidden_layers
    kernel = spec.attn_implementation
    attention = packed_attention.PACKED if kernel in ("auto", "flash_attention_2") else kernel
    model = skeleton(config, getattr(torch, spec.dtype), attention)
    adapters.attach(model, replace(spec.lora, init_from=None, init_lora_weights=True))  # those are about values
    model.model.rotary_emb.rope_type = "default"  # longrope looks at positions; its angles have the same shape
    return cast("Phi3ForCausalLM", model.train())


def take_step(
    model: Phi3ForCausalLM,
    spec: RunSpec,
    shape: BatchShape,
    *,
    device: str = "cpu",
    on_phase: Callable[[], None] = lambda: None,
) -> None:
    """Run forward pass, loss and backward pass of a model that is on a type of device.

    ``on_phase`` is called after the layers' forward pass, after the loss, and after the backward pass.

    Raises:
        ConfigError: If a document is longer than the context of the base.
    """
    packed_attention.check_lengths(shape.lengths, spec.config, spec.base)
    places = len(shape.lengths), max(map(sum, shape.lengths))
    zeros = torch.zeros(places, dtype=torch.int64, device=device)
    batch = Batch(input_ids=zeros, labels=zeros, position_ids=zeros, document_lengths=shape.lengths, document_ids=[])
    mixed = torch.autocast(device, torch.bfloat16) if spec.mixed else nullcontext()
    with mixed, precision.autocast(model, device):
        hidden = packed_attention.last_hidden_state(model, batch)
        on_phase()
        # as many as are supervised; which ones is a question of values
        states = hidden.flatten(0, 1).index_select(0, torch.arange(shape.supervised, device=device))
        loss_sum = loss.summed_loss(states, zeros.flatten()[: shape.supervised], model.lm_head)
    del hidden, states
    on_phase()
    loss_sum.backward()
    on_phase()
