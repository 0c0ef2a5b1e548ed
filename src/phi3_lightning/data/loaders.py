"""DataLoaders in the one shape that Lightning takes in every stage, on one rank and on many."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader

from phi3_lightning.batch import PromptBatch
from phi3_lightning.config.data import DataConfig, Split
from phi3_lightning.data.collate import Document, collate, collate_prompts, pad_id
from phi3_lightning.data.context_length import ContextLength
from phi3_lightning.data.plans import plan_split
from phi3_lightning.data.resume import position_of, ranks_of
from phi3_lightning.data.sources import find_sources
from phi3_lightning.data.splits import data_seed, make_encoder
from phi3_lightning.data.streaming import StreamedBatches, StreamLoader
from phi3_lightning.data.template import ChatTemplate
from phi3_lightning.errors import ConfigError


class NoBatches(CombinedLoader):
    """No loader at all. An empty list would be a loader to Lightning, of which it warns that it is empty."""

    def __init__(self) -> None:
        super().__init__([], "sequential")

    @property
    def flattened(self) -> list[Any]:
        """An empty list."""
        return []

    @flattened.setter
    def flattened(self, flattened: list[Any]) -> None:
        """Do nothing: Lightning sets what it has read."""


def collate_function(split: Split, template: ChatTemplate) -> Callable[[list[list[Document]]], Any]:
    """Return what makes a batch of a split from the documents of its rows."""
    pad_token_id = pad_id(template.tokenizer)
    if split == "predict":
        return partial(_collate_prompt_rows, pad_token_id=pad_token_id, stop_ids=template.stop_ids)
    return partial(collate, pad_token_id=pad_token_id)


def _collate_prompt_rows(rows: list[list[Document]], pad_token_id: int, stop_ids: list[int]) -> PromptBatch:
    return collate_prompts([prompt for row in rows for prompt in row], pad_token_id, stop_ids)


def stream_loader(
    options: DataConfig, template: ChatTemplate, context_length: ContextLength | None, trainer: Trainer | None
) -> StreamLoader:
    """Load the training data as they are read.

    Raises:
        ConfigError: If the Trainer never ends such a run, or never validates it.
    """
    if trainer is not None and trainer.max_steps == -1:
        raise ConfigError("trainer.max_steps: not given; data.streaming has no end, so give a number of steps")
    if trainer is not None and options.val is not None and trainer.val_check_interval == 1.0:
        raise ConfigError(
            "trainer.val_check_interval: data.streaming has no epochs to validate after; give a number of batches"
        )
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


def worker_options(num_workers: int) -> dict[str, Any]:
    """Return the options of a DataLoader with so many workers."""
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),  # iterating draws from it, and must not draw from the global one
    }
