"""DataLoaders in the one shape that Lightning takes in every stage, on one rank and on many."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader

from phi3_lightning.config.data import DataConfig, Split
from phi3_lightning.data.collate import Document, collate, collate_prompts, pad_id
from phi3_lightning.data.context_length import ContextLength
from phi3_lightning.data.conversation import Kind
from phi3_lightning.data.plans import plan_split
from phi3_lightning.data.resume import position_of, ranks_of
from phi3_lightning.data.sources import find_sources
from phi3_lightning.data.splits import data_seed, make_encoder
from phi3_lightning.data.streaming import StreamedBatches, StreamLoader
from phi3_lightning.data.template import ChatTemplate
from phi3_lightning.errors import ConfigError


class NoBatches(CombinedLoader):
    """No loader at all. Lightning would take an empty list for a loader, and warn that it is empty."""

    def __init__(self) -> None:
        super().__init__([], "sequential")

    @property
    def flattened(self) -> list[Any]:
        """An empty list."""
        return []

    @flattened.setter
    def flattened(self, flattened: list[Any]) -> None:
        """Do nothing: Lightning sets what it has just read."""


def collate_function(
    split: Split, template: ChatTemplate, kind: Kind = "chat"
) -> Callable[[list[list[Document]]], Any]:
    """Return the function that makes a batch of a split from the documents of its rows; fillers are of ``kind``."""
    pad_token_id = pad_id(template.tokenizer)
    if split == "predict":
        return partial(collate_prompts, pad_token_id=pad_token_id, stop_ids=template.stop_ids)
    return partial(collate, pad_token_id=pad_token_id, kind=kind)


def stream_loader(
    options: DataConfig, template: ChatTemplate, context_length: ContextLength | None, trainer: Trainer | None
) -> StreamLoader:
    """Return the loader of streamed training data.

    Raises:
        ConfigError: If the Trainer never ends such a run, never validates it, or trains its beginning again and again.
    """
    if trainer is not None:
        _check_trainer(trainer, validates=options.val is not None)
    stream = StreamedBatches(
        find_sources(options.files("train") or [], streaming=True),
        make_encoder("train", options, template, context_length),
        partial(plan_split, "train", options=options, context_length=context_length),
        collate_function("train", template),
        seed=data_seed(options),
        skip_bad_rows=options.on_bad_row == "skip",
        **ranks_of(trainer),
    )
    loader = StreamLoader(stream, batch_size=None, **worker_options(options.num_workers))
    loader.position = partial(position_of, trainer)
    return loader


def _check_trainer(trainer: Any, *, validates: bool) -> None:  # type checkers do not see its flags for debugging
    if trainer.max_steps == -1:
        raise ConfigError("trainer.max_steps: not given; data.streaming has no end, so give a number of steps")
    if validates and trainer.val_check_interval == 1.0:
        raise ConfigError(
            "trainer.val_check_interval: data.streaming has no epochs to validate after; give a number of batches"
        )
    limit = trainer.limit_train_batches
    if isinstance(limit, int) and not (trainer.fast_dev_run or trainer.overfit_batches):
        raise ConfigError(
            f"trainer.limit_train_batches: {limit} makes epochs, each of which would begin data.streaming again and "
            "train the same rows; leave it out, and give trainer.max_steps"
        )


def worker_options(num_workers: int) -> dict[str, Any]:
    """Return the options of a DataLoader with this many workers."""
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),  # iterating draws from it, and must not draw from the global one
    }
