"""Batches of token ids, which data and model share."""

from phi3_lightning.batch.types import IGNORE_INDEX, Batch, PromptBatch

__all__ = ["IGNORE_INDEX", "Batch", "PromptBatch"]
