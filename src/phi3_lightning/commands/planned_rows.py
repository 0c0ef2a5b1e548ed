"""The rows of a plan: the user's, or placeholders of the largest size that the options allow."""

from dataclasses import dataclass
from typing import cast

from phi3_lightning.batch import Batch
from phi3_lightning.config.data import DataConfig
from phi3_lightning.data.collate import collate, full_row
from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.errors import ConfigError, DataError
from phi3_lightning.planning.step import BatchShape


@dataclass(frozen=True)
class PlannedRows:
    """The rows on which a run would train."""

    largest: Batch
    """The micro-batch with the most tokens."""
    batches: int | None
    """Micro-batches of an epoch, of all devices together; None: unknown."""
    tokens: int
    """Tokens of an epoch, where that is known."""
    source: str
    """Their origin, in words."""

    @property
    def shape(self) -> BatchShape:
        """The size of the largest micro-batch."""
        return BatchShape.of(self.largest)


def planned_rows(data: ChatDataModule) -> PlannedRows:
    """Return the rows of the training data, or placeholders where these cannot be read."""
    if data.options.train is None:
        return _full_rows(data.options, "data.train is not given")
    if data.options.streaming:
        return _full_rows(data.options, "data.train is streamed")
    try:
        data.prepare_data()
        data.setup("fit")
    except (ConfigError, DataError) as error:  # which the plan shows, and fit raises
        return _full_rows(data.options, str(error))
    plan = data.plans["train"]
    tokens = int(plan.tokens(data.prepared["train"].lengths()).sum())
    largest = cast("Batch", data.largest_train_batch())  # of no stream
    return PlannedRows(largest, len(plan), tokens, f"the largest of {len(plan):,} in data.train")


def _full_rows(options: DataConfig, reason: str) -> PlannedRows:
    """Rows of one document of ``max_length`` tokens, all of them trained."""
    length, tokens = options.max_length, options.max_tokens_per_batch
    size = tokens // length if isinstance(tokens, int) else options.batch_size
    batch = collate([full_row(length)] * size, pad_token_id=0)
    return PlannedRows(batch, None, 0, f"full rows, since the data were not read: {reason}")
