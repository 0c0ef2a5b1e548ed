"""A training step by the code of a real one, on a batch whose size alone matters."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from torch import Tensor
from transformers import Phi3ForCausalLM

from phi3_lightning import adapters
from phi3_lightning.adapters.adapter import Adapter
from phi3_lightning.batch import IGNORE_INDEX, Batch
from phi3_lightning.model import int8_dynamic, loss, packed_attention, precision
from phi3_lightning.model.base import skeleton
from phi3_lightning.planning.spec import RunSpec
from phi3_lightning.reference import evaluating


@dataclass(frozen=True)
class BatchShape:
    """The size of a micro-batch."""

    lengths: list[list[int]]
    """Tokens of each document, row by row."""
    supervised: int
    """Tokens that have a label."""
    shared: list[list[int]] | None = None
    """Leading tokens that each document has in common with the one before it, row by row; None: there are no pairs."""

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """Return the size of a batch."""
        supervised = int((batch["labels"] != IGNORE_INDEX).sum())
        return cls(batch["document_lengths"], supervised, batch.get("shared_lengths"))

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(map(sum, self.lengths))

    def computed_tokens(self, spec: RunSpec) -> int:
        """Return the tokens that a run computes; a kernel may compute once what both answers of a pair begin with."""
        return self.tokens - (sum(map(sum, self.shared or [])) if spec.shares_prompts else 0)

    def times(self, rows: int) -> "BatchShape":
        """Return the size of that many such batches in one."""
        shared = None if self.shared is None else self.shared * rows
        return BatchShape(self.lengths * rows, self.supervised * rows, shared)


def build_meta_model(spec: RunSpec, layers: int | None = None) -> tuple[Phi3ForCausalLM, Adapter]:
    """Return a run's model, or one with fewer layers, on the meta device, and its adapter; it recomputes nothing."""
    config = deepcopy(spec.config)
    config.num_hidden_layers = layers or config.num_hidden_layers
    kernel = spec.attn_implementation
    attention = packed_attention.PACKED if kernel in ("auto", "flash_attention_2") else kernel
    model = skeleton(config, getattr(torch, spec.dtype), attention)
    if spec.quantization == "int8_dynamic":
        int8_dynamic.check_device("cuda" if spec.on_gpu else "cpu")
        int8_dynamic.quantize_layers(model)
    lora = replace(spec.lora, init_from=None, init_lora_weights=True)  # those are about values
    adapter = adapters.attach(model, lora)
    model.model.rotary_emb.rope_type = "default"  # longrope looks at positions; its angles have the same shape
    return cast("Phi3ForCausalLM", model.train()), adapter


def take_step(
    model: Phi3ForCausalLM,
    adapter: Adapter,
    spec: RunSpec,
    shape: BatchShape,
    *,
    device: str = "cpu",
    on_phase: Callable[[], None] = lambda: None,
    trains: bool = True,
) -> None:
    """Run forward pass, loss and backward pass of a model that is on a type of device; or, to validate, no backward.

    ``on_phase`` is called after the layers' forward pass, after the loss, after the passes without a gradient that the
    objective takes, and after the backward pass if there is one.

    Raises:
        ConfigError: If a document is longer than the context of the base.
    """
    packed_attention.check_lengths(shape.lengths, spec.config, spec.base)
    places = len(shape.lengths), max(map(sum, shape.lengths))
    zeros = torch.zeros(places, dtype=torch.int64, device=device)
    batch = Batch(input_ids=zeros, labels=zeros, position_ids=zeros, document_lengths=shape.lengths, document_ids=[])
    if shape.shared is not None and spec.shares_prompts:
        batch["shared_lengths"] = shape.shared
    targets = zeros.flatten()[: shape.supervised]
    mixed = torch.autocast(device, torch.bfloat16) if spec.mixed else nullcontext()
    evaluation = nullcontext() if trains else evaluating(model)
    with mixed, precision.autocast(model, device), evaluation, torch.set_grad_enabled(trains):
        hidden = packed_attention.last_hidden_state(model, batch)
        on_phase()
        loss_sum = _loss(spec, model, hidden, targets)
        on_phase()
        for context in _further_passes(spec, adapter):
            with torch.no_grad(), evaluating(model), context:
                _loss(spec, model, packed_attention.last_hidden_state(model, batch), targets)
    del hidden
    on_phase()
    if trains:
        loss_sum.backward()
        on_phase()


def _loss(spec: RunSpec, model: Phi3ForCausalLM, hidden: Tensor, targets: Tensor) -> Tensor:
    # as many states as are supervised; which ones is a question of values
    states = hidden.flatten(0, 1).index_select(0, torch.arange(len(targets), device=hidden.device))
    if spec.objective.name == "supervised":
        return loss.summed_loss(states, targets, model.lm_head)
    return loss.token_losses(states, targets, model.lm_head).sum()


def _further_passes(spec: RunSpec, adapter: Adapter) -> list[AbstractContextManager[None]]:
    """The contexts of the passes without a gradient; the mismatched answers of KTO are as long as its own."""
    by_reference: Callable[[], AbstractContextManager[None]] = nullcontext if spec.copies_adapter else adapter.disabled
    passes = spec.objective.extra_forward_passes
    return [nullcontext() if index == 1 else by_reference() for index in range(passes)]
