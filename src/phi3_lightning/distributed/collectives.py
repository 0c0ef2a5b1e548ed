"""What ranks exchange as Python objects."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch.distributed


def all_gather_object(trainer: pl.Trainer, item: Any) -> list[Any]:
    """Return the items of all ranks, in their order; every rank calls this."""
    items = [item]
    if trainer.world_size > 1:
        items = [None] * trainer.world_size
        torch.distributed.all_gather_object(items, item)
    return items


def all_gather_dict(trainer: pl.Trainer, items: Mapping[int, Any]) -> dict[int, Any]:
    """Return the union of the dictionaries of all ranks; every rank calls this."""
    return {key: value for share in all_gather_object(trainer, dict(items)) for key, value in share.items()}
