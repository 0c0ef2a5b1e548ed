"""What data and model share: batches of token ids."""

from phi3_lightning.batch.types import IGNORE_INDEX, Batch, PromptBatch

__all__ = ["IGNORE_INDEX", "Batch", "PromptBatch"]
