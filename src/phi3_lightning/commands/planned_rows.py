"""The rows of a plan: the user's, or placeholders of the largest size that the options allow."""

from dataclasses import dataclass
from typing import cast

import numpy as np

from phi3_lightning.batch import Batch
from phi3_lightning.config import Objective
from phi3_lightning.config.data import DataConfig
from phi3_lightning.data.collate import collate, full_row
from phi3_lightning.data.conversation import Kind
from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.data.plans import row_capacity
from phi3_lightning.errors import ConfigError, DataError
from phi3_lightning.planning.step import BatchShape
from phi3_lightning.preferences import check_data, learns_from


@dataclass(frozen=True)
class PlannedRows:
    """The rows on which a run would train."""

    largest: Batch
    """The micro-batch with the most tokens."""
    largest_row: Batch
    """The row with the most tokens, in a batch of its own."""
    batches: int | None
    """Micro-batches of an epoch, of all devices together; None: unknown."""
    tokens: int
    """Tokens of an epoch, where that is known."""
    source: str
    """Their origin, in words."""
    single: int = 0
    """Micro-batches of an epoch that hold one document."""

    @property
    def shape(self) -> BatchShape:
        """The size of the largest micro-batch."""
        return BatchShape.of(self.largest)


def planned_rows(data: ChatDataModule, objective: Objective) -> PlannedRows:
    """Return the rows of the training data, or placeholders where these cannot be read.

    Raises:
        ConfigError: If the objective cannot learn from them.
    """
    kind = learns_from(objective)
    if data.options.train is None:
        return _full_rows(data.options, kind, "data.train is not given")
    try:
        data.validate_sources()
    except (ConfigError, DataError) as error:  # which the plan shows, and fit raises
        return _full_rows(data.options, kind, str(error))
    try:
        check_data(objective, data)
    except DataError as error:
        return _full_rows(data.options, kind, str(error))
    if data.options.streaming:
        return _full_rows(data.options, kind, "data.train is streamed")
    try:
        data.prepare_data()
        data.setup("fit")
    except (ConfigError, DataError) as error:
        return _full_rows(data.options, kind, str(error))
    check_data(objective, data)  # of a data set on the hub, too
    plan = data.plans["train"]
    tokens = int(plan.tokens(data.prepared["train"].lengths()).sum())
    largest = cast("Batch", data.largest_train_batch())  # of no stream
    single = int((np.diff(plan.rows[plan.batches]) == 1).sum())
    source = f"the largest of {len(plan):,} in data.train"
    return PlannedRows(largest, data.largest_train_row(), len(plan), tokens, source, single)


def _full_rows(options: DataConfig, kind: Kind, reason: str) -> PlannedRows:
    """Rows of one document of ``max_length`` tokens, all trained; of pairs, rows of two such conversations."""
    tokens = options.max_tokens_per_batch
    size = tokens // row_capacity(options, kind) if isinstance(tokens, int) else options.batch_size
    batch, row = (collate([full_row(options.max_length, kind)] * rows, pad_token_id=0) for rows in (size, 1))
    return PlannedRows(batch, row, None, 0, f"full rows, since the data were not read: {reason}")
