"""The rows that a plan is made for: the user's, or made-up ones of the largest size that the options allow."""

from dataclasses import dataclass
from typing import cast

import numpy as np

from phi3_lightning.batch import IGNORE_INDEX, Batch
from phi3_lightning.data.collate import Document, collate
from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.data.options import Options
from phi3_lightning.errors import ConfigError, DataError
from phi3_lightning.planning.step import Shape


@dataclass(frozen=True)
class PlannedRows:
    """What a run would train on."""

    largest: Batch
    """The micro-batch with the most tokens."""
    batches: int | None
    """Micro-batches of an epoch, of all devices together; None: unknown."""
    tokens: int
    """Tokens of an epoch, where that is known."""
    source: str
    """Where they are from, in words."""

    @property
    def shape(self) -> Shape:
        """The size of the largest micro-batch."""
        return Shape(self.largest["lengths"], int((self.largest["labels"] != IGNORE_INDEX).sum()))


def planned_rows(data: ChatDataModule) -> PlannedRows:
    """Return the rows of the training data, or made-up ones where these cannot be read.

    Args:
        data: As it is configured.
    """
    if data.options.train is None:
        return _made_up(data.options, "data.train is not given")
    if data.options.streaming:
        return _made_up(data.options, "data.train is streamed")
    try:
        data.prepare_data()
        data.setup("fit")
    except (ConfigError, DataError) as error:  # said in the table; fit says it too
        return _made_up(data.options, str(error))
    plan = data.plans["train"]
    tokens = int(plan.tokens(data.prepared["train"].lengths()).sum())
    largest = cast("Batch", data.largest_train_batch())  # of no stream
    return PlannedRows(largest, len(plan), tokens, f"the largest of {len(plan):,} in data.train")


def _made_up(options: Options, reason: str) -> PlannedRows:
    """Rows of one document of ``max_length`` tokens, all of them trained."""
    length = options.max_length
    size = options.batch_size if options.max_tokens_per_batch is None else options.max_tokens_per_batch // length
    ids, spans = np.ones(length, np.int32), np.array([0, length], np.int32)
    rows = [[Document(row, ids, spans)] for row in range(size)]
    return PlannedRows(collate(rows, pad_token_id=0), None, 0, f"full rows, since the data were not read: {reason}")
