"""The batches of each split: planned once from options and lengths, and again when the size of batches changes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from phi3_lightning.batch import Batch
from phi3_lightning.config.data import DataConfig, Split
from phi3_lightning.data.context_length import ContextLength
from phi3_lightning.data.conversation import Kind
from phi3_lightning.data.packing import Ints, Plan, plan_batches
from phi3_lightning.data.sampler import PlannedBatches
from phi3_lightning.data.splits import data_seed, share_out
from phi3_lightning.data.tokenized import TokenizedDataset
from phi3_lightning.errors import ConfigError

LEAST_VALIDATION_BATCHES = 4
"""Micro-batches of each of several ranks in a validation, at least, so that none waits long for the others."""


class SplitPlans:
    """The documents of each split, and which of them make a batch.

    Args:
        options: The options; here the ``batch_size`` that is decided replaces ``max_tokens_per_batch: auto``.
    """

    def __init__(self, options: DataConfig) -> None:
        self.options = options
        self._auto = options.max_tokens_per_batch == "auto"
        self.context_length: ContextLength | None = None
        self.prepared: dict[Split, TokenizedDataset] = {}
        self.plans: dict[Split, Plan] = {}
        self._validation_tokens: int | None = None

    def reset(self, options: DataConfig) -> None:
        """Take the options as configured, for what is planned from now on."""
        self.options, self._validation_tokens = options, None

    def add(self, split: Split, prepared: TokenizedDataset) -> None:
        """Distribute the documents of a split, and plan their batches."""
        for share, documents in share_out(split, prepared, self.options, data_seed(self.options)).items():
            self.prepared[share] = prepared
            self._plan(share, documents)

    def of_stage(self, stage: Literal["validate", "test", "predict"]) -> TokenizedDataset:
        """Return the documents that a stage of the Trainer measures or answers."""
        splits: dict[str, Split] = {"validate": "val", "test": self.options.tested, "predict": "predict"}
        return self.prepared[splits[stage]]

    def replan(self, **changes: Any) -> None:
        """Change options, and plan the batches of all splits again."""
        self.options = replace(self.options, **changes)
        for split, plan in self.plans.items():
            self._plan(split, np.sort(plan.documents))

    def decide(self, rows: int, validation_tokens: int | None, ranks: int) -> None:
        """Set the rows of a micro-batch, and plan the batches of all splits again.

        Micro-batches of validation have ``validation_tokens`` where that is more than such rows may have, or as many as
        let the ranks share them evenly. None: they have the same rows.
        """
        self._validation_tokens = None
        if validation_tokens is not None and "val" in self.plans:
            held_out = self.prepared["val"]
            if ranks > 1:
                tokens = int(held_out.lengths()[self.plans["val"].documents].sum())
                validation_tokens = min(validation_tokens, tokens // (ranks * LEAST_VALIDATION_BATCHES))
            if validation_tokens > rows * row_capacity(self.options, held_out.statistics.kind):
                self._validation_tokens = validation_tokens
                rank_zero_info(f"a micro-batch of validation has up to {validation_tokens} tokens")
        self.replan(batch_size=rows, max_tokens_per_batch=None)

    def _plan(self, split: Split, documents: Ints) -> None:
        prepared, seed = self.prepared[split], data_seed(self.options)
        chosen = prepared.chosen_lengths()
        options = self.options
        if split == "val" and self._validation_tokens is not None:
            options = replace(options, max_tokens_per_batch=self._validation_tokens)
        plan = plan_split(
            split,
            prepared.lengths()[documents],
            options,
            self.context_length,
            seed,
            chosen_lengths=None if chosen is None else chosen[documents],
        )
        self.plans[split] = replace(plan, documents=documents[plan.documents])

    def order(self) -> dict[str, Any]:
        """Return what determines the order of training batches."""
        decided = self._auto and self.options.max_tokens_per_batch != "auto"
        decision = {"batch_size": self.options.batch_size} if decided else {}
        return {"seed": data_seed(self.options), **decision, "plan": self.plans["train"].fingerprint()}

    def largest_train_batch(self, collate: Callable[[Any], Any], *, single_row: bool = False) -> Batch:
        """Return the training batch, or row in a batch of its own, with the most tokens."""
        plan = self.plans["train"]
        if single_row:
            plan = replace(plan, batches=np.arange(len(plan.rows)))
        largest = int(plan.tokens(self.prepared["train"].lengths()).argmax())
        return cast("Batch", PlannedBatches(self.prepared["train"], plan, collate)[largest])

    def describe_train(self) -> str:
        """Return the numbers of documents, rows and batches of the training data, and how full packed rows are."""
        plan = self.plans["train"]
        prepared, rows = self.prepared["train"], len(plan.rows) - 1
        tokens = prepared.lengths()[plan.documents].sum()
        capacity = rows * row_capacity(self.options, prepared.statistics.kind)
        full = f", {tokens / capacity:.1%} full" if self.options.packing else ""
        documents = "pairs" if prepared.statistics.kind == "pair" else "documents"
        return f"train: {len(plan.documents)} {documents} in {rows} rows{full}, {len(plan)} batches"


def row_capacity(options: DataConfig, kind: Kind) -> int:
    """Return the most tokens of a row: ``max_length``, or twice as many for pairs."""
    return options.max_length * (2 if kind == "pair" else 1)


def plan_split(
    split: Split,
    lengths: Ints,
    options: DataConfig,
    context_length: ContextLength | None,
    seed: int,
    *,
    chosen_lengths: Ints | None = None,
) -> Plan:
    """Plan the batches of documents with these lengths, of shape (documents,).

    Training batches are shuffled by the seed, others go from long to short; prompts are not packed. ``chosen_lengths``
    are the tokens of the chosen side of each pair; None: no pairs.

    Raises:
        ConfigError: If a batch cannot hold a pair.
    """
    prompts, tokens = split == "predict", options.max_tokens_per_batch
    capacity = row_capacity(options, "chat" if chosen_lengths is None else "pair")
    if isinstance(tokens, int) and tokens < capacity and not prompts:
        raise ConfigError(
            f"data.max_tokens_per_batch: {tokens} holds no row of pairs, each with two conversations of "
            f"data.max_length {options.max_length}; give {capacity} or more"
        )
    return plan_batches(
        lengths,
        batch_size=options.predict_batch_size if prompts else options.batch_size,
        max_tokens=tokens if isinstance(tokens, int) and not prompts else None,
        capacity=capacity if options.packing and not prompts else None,
        seed=seed if split == "train" else None,
        length_boundary=context_length.short if context_length is not None and not prompts else None,
        chosen_lengths=chosen_lengths,
    )
