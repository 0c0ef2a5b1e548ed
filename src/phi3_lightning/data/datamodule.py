"""ChatDataModule: chat files in, batches out."""

import os
import warnings
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerFast

from phi3_lightning.batch import PromptBatch
from phi3_lightning.data.collate import Document, collate, collate_prompts
from phi3_lightning.data.encode import EncodeOptions, Encoder
from phi3_lightning.data.options import Files, Options, Split
from phi3_lightning.data.packing import Ints, Plan, plan_batches
from phi3_lightning.data.prepare import Prepared, Statistics, prepare
from phi3_lightning.data.sampler import BatchLoader, BatchOrder, PlannedBatches
from phi3_lightning.data.sources import find_sources
from phi3_lightning.data.template import ChatTemplate, load_tokenizer
from phi3_lightning.data.window import Window, read_window
from phi3_lightning.errors import CheckpointError, ConfigError, DivergenceError


class ChatDataModule(LightningDataModule):
    """Chats, tokenised once, as batches in which exactly the assistant's tokens are supervised.

    A file holds JSON lines, one JSON array, or Parquet, with OpenAI ``messages``, or ``prompt`` and ``completion``.

    Args:
        train: Training data: a file, a data set on the hub (``owner/name:split``), or several.
        val: Validation data. null: a part of the training data, see ``val_fraction``.
        val_fraction: The share of the training rows that validates where ``val`` is null. 0: no validation.
        test: Data for ``test``.
        predict: Prompts for ``predict``; an answer at the end of a row is left out.
        tokenizer: Folder or hub id of the tokenizer. The command line fills in ``model.base``.
        revision: Branch, tag or commit of the tokenizer on the hub.
        max_length: Tokens of a row at most. Longer chats are dropped and counted.
        packing: Whether several chats share a row, without seeing each other.
        batch_size: Rows of a micro-batch.
        num_workers: Processes that collate batches ahead.
        num_proc: Processes that tokenise; the result does not depend on it.
        on_bad_row: Whether rows that cannot be used are an error, or left out and counted.
        overlong: What becomes of chats longer than ``max_length``.
        cache_dir: Where tokenised data are kept. null: where ``datasets`` keeps its cache.
        seed: Decides split and order. null: the global seed of ``seed_everything``, or 0.

    Raises:
        ConfigError: A value is out of its range.
    """

    def __init__(
        self,
        train: Files | None = None,
        val: Files | None = None,
        val_fraction: float = 0.05,
        test: Files | None = None,
        predict: Files | None = None,
        tokenizer: str | None = None,
        revision: str | None = None,
        max_length: int = 2048,
        packing: bool = True,
        batch_size: int = 4,
        num_workers: int = 2,
        num_proc: int = 1,
        on_bad_row: Literal["raise", "skip"] = "raise",
        overlong: Literal["drop"] = "drop",
        cache_dir: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        # Not logged: Lightning refuses to log a name, such as `revision`, that the module has too with another value.
        self.save_hyperparameters(logger=False)
        self.options = Options(
            train=train,
            val=val,
            val_fraction=val_fraction,
            test=test,
            predict=predict,
            tokenizer=tokenizer,
            revision=revision,
            max_length=max_length,
            packing=packing,
            batch_size=batch_size,
            num_workers=num_workers,
            num_proc=num_proc,
            on_bad_row=on_bad_row,
            overlong=overlong,
            cache_dir=cache_dir,
            seed=seed,
        )
        self.statistics: dict[Split, Statistics] = {}
        self._prepared: dict[Split, Prepared] = {}
        self._plans: dict[Split, Plan] = {}
        self._saved_order: dict[str, Any] | None = None

    def validate_sources(self) -> None:
        """Check, before anything is loaded, that every file can be read and that rows fit the model.

        Raises:
            DataError: A file is missing, empty or not readable.
            ConfigError: ``max_length`` is beyond the model's window.
        """
        for split in self.options.needed(None):
            find_sources(self.options.files(split) or [])
        self._window()

    def prepare_data(self) -> None:
        """Tokenise into the cache. Lightning calls this in one process a node.

        Raises:
            ConfigError: Something that is needed was not given.
            DataError: Rows cannot be used.
        """
        self.validate_sources()
        stage = None if self.trainer is None else self.trainer.state.fn
        template = ChatTemplate(self._load_tokenizer())
        for split in self.options.needed(stage):
            self._prepare(split, template)

    def setup(self, stage: str | None = None) -> None:
        """Map the tokenised data and plan the batches, in every process alike.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None: all that data were given for.
        """
        self.tokenizer = self._load_tokenizer()
        self.template = ChatTemplate(self.tokenizer)
        for split in self.options.needed(stage):
            if split not in self._prepared:
                self._prepared[split] = self._prepare(split, self.template)
                self.statistics[split] = self._prepared[split].statistics
                rank_zero_info(f"{split}: {self.statistics[split]}")
                self._plans |= {share: self._plan(share, rows) for share, rows in self._shares(split).items()}
                if split == "train" and stage != "validate":
                    self._report_plan()

    @property
    def train_documents(self) -> int:
        """Documents that are trained in an epoch."""
        return len(self._plans["train"].documents)

    @property
    def train_rows(self) -> int:
        """Rows, packed or not, that are trained in an epoch."""
        return len(self._plans["train"].rows) - 1

    def train_dataloader(self) -> BatchLoader:
        """Batches of the training data, in an order that seed and epoch decide.

        Returns:
            Yields ``Batch``.

        Raises:
            CheckpointError: The run goes on within an epoch, but data, seed or ranks are not what they were.
        """
        self._check_resumed_order()
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """Batches of the validation data, longest first.

        Returns:
            Yields ``Batch``; an empty list where there is nothing to validate on.
        """
        if "val" not in self._plans:
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # that was the intention
            return []
        return self._loader("val")

    def test_dataloader(self) -> BatchLoader:
        """Batches of the test data, longest first.

        Returns:
            Yields ``Batch``.
        """
        return self._loader("test")

    def predict_dataloader(self) -> BatchLoader:
        """Batches of prompts, longest first.

        Returns:
            Yields ``PromptBatch``, whose ``row_ids`` tell the order of the file.
        """
        return self._loader("predict")

    def describe_rows(self, row_ids: list[int]) -> list[str]:
        """Say where training documents came from.

        Args:
            row_ids: What batches carry as ``row_ids``.

        Returns:
            A place a document, such as ``chats.jsonl:12``.
        """
        return self._prepared["train"].describe(row_ids)

    def on_exception(self, exception: BaseException) -> None:
        """Name the rows in which training diverged.

        Args:
            exception: What stopped the run.
        """
        if isinstance(exception, DivergenceError) and exception.row_ids:
            places = self.describe_rows(exception.row_ids)
            exception.add_note("Rows of this step: " + ", ".join(dict.fromkeys(places)))

    def state_dict(self) -> dict[str, Any]:
        """What decides the order of batches, so that a resumed run can tell whether it is the same.

        Returns:
            Seed, ranks and a fingerprint of the plan; nothing without training data.
        """
        if "train" not in self._plans:
            return {}
        plan = self._plans["train"].fingerprint()
        return {"seed": self._seed(), "ranks": self._ranks()["num_replicas"], "plan": plan}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint says about the order until training goes on from it.

        Args:
            state_dict: What ``state_dict`` returned.
        """
        self._saved_order = state_dict

    def _window(self) -> Window | None:
        """The model's window, after a look whether ``max_length`` fits."""
        if self.options.tokenizer is None:
            return None
        window = read_window(self.options.tokenizer, self.options.revision)
        if window is not None and self.options.max_length > window.longest:
            raise ConfigError(
                f"data.max_length: {self.options.max_length} is beyond the {window.longest} tokens that "
                f"{self.options.tokenizer} can read; give {window.longest} or less."
            )
        return window

    def _load_tokenizer(self) -> PreTrainedTokenizerFast:
        if self.options.tokenizer is None:
            raise ConfigError("data.tokenizer: not given; name the folder or hub id of the model's tokenizer.")
        return load_tokenizer(self.options.tokenizer, self.options.revision)

    def _prepare(self, split: Split, template: ChatTemplate) -> Prepared:
        window = self._window()
        if split == "predict":
            limit = self.options.max_length if window is None else window.longest
            options = EncodeOptions("prompt", limit, "drop")
        else:
            options = EncodeOptions("chat", self.options.max_length, self.options.overlong)
        return prepare(
            find_sources(self.options.files(split) or []),
            Encoder(template, options),
            on_bad_row=self.options.on_bad_row,
            cache_dir=self.options.cache_dir,
            num_proc=self.options.num_proc,
        )

    def _shares(self, split: Split) -> dict[Split, Ints]:
        """The documents of a split; those of the training data may be shared with validation."""
        count = len(self._prepared[split].table)
        if split != "train" or self.options.val is not None or self.options.val_fraction == 0 or count < 2:
            return {split: np.arange(count)}
        size = min(max(round(count * self.options.val_fraction), 1), count - 1)
        mixed = np.random.default_rng(self._seed()).permutation(count)
        self._prepared["val"] = self._prepared["train"]
        return {"train": np.sort(mixed[size:]), "val": np.sort(mixed[:size])}

    def _report_plan(self) -> None:
        plan = self._plans["train"]
        tokens = self._prepared["train"].lengths()[plan.documents].sum()
        full = f", {tokens / (self.train_rows * self.options.max_length):.1%} full" if self.options.packing else ""
        rank_zero_info(f"train: {self.train_documents} documents in {self.train_rows} rows{full}, {len(plan)} batches")

    def _plan(self, split: Split, documents: Ints) -> Plan:
        window = self._window()
        plan = plan_batches(
            self._prepared[split].lengths()[documents],
            batch_size=self.options.batch_size,
            capacity=self.options.max_length if self.options.packing and split != "predict" else None,
            seed=self._seed() if split == "train" else None,
            apart=window.short if window is not None and split != "predict" else None,
        )
        return Plan(documents[plan.documents], plan.rows, plan.batches)

    def _loader(self, split: Split, *, shuffle: bool = False) -> BatchLoader:
        pad = self.tokenizer.pad_token_id
        pad = 0 if pad is None else pad
        if split == "predict":
            make: Any = partial(_collate_prompt_rows, pad_token_id=pad, stop_ids=self.template.stop_ids)
        else:
            make = partial(collate, pad_token_id=pad)
        batches = PlannedBatches(self._prepared[split], self._plans[split], make)
        return BatchLoader(
            batches,
            batch_size=None,
            sampler=BatchOrder(
                batches,
                seed=self._seed(),
                shuffle=shuffle,
                position=self._position if split == "train" else lambda: 0,
                **self._ranks(),
            ),
            num_workers=self.options.num_workers,
            persistent_workers=self.options.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # of its own: iterating draws from it, and must not from the global one
        )

    def _seed(self) -> int:
        given = self.options.seed
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if given is None else int(given)

    def _ranks(self) -> dict[str, int]:
        several = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return {"num_replicas": 1, "rank": 0} if several is None else several

    def _position(self) -> int:
        return 0 if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _check_resumed_order(self) -> None:
        saved, self._saved_order = self._saved_order, None
        now = self.state_dict()
        changed = [f"{key} was {saved[key]}, now {now[key]}" for key in now if saved[key] != now[key]] if saved else []
        if not changed or self.trainer is None:
            return
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        if progress.current.ready and not progress.is_last_batch:
            raise CheckpointError(
                f"The checkpoint stopped within an epoch whose order cannot be continued: {'; '.join(changed)}. "
                "Give the same data, data options, seed and devices, or resume from the end of an epoch."
            )
        rank_zero_info(f"The order of batches is new from this epoch on: {'; '.join(changed)}.")


def _collate_prompt_rows(rows: list[list[Document]], pad_token_id: int, stop_ids: list[int]) -> PromptBatch:
    return collate_prompts([prompt for row in rows for prompt in row], pad_token_id, stop_ids)
