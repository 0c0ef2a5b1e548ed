"""ChatDataModule: chat files in, batches out."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal, Self, cast

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info

from phi3_lightning.batch import Batch, PromptBatch
from phi3_lightning.config.checks import check_names
from phi3_lightning.config.data import DataConfig, Split
from phi3_lightning.contracts import Origin
from phi3_lightning.data.collate import Document, collate, collate_prompts, full_row
from phi3_lightning.data.fields import name_unused
from phi3_lightning.data.loaders import batch_loader, stream_loader
from phi3_lightning.data.packing import Ints, Plan
from phi3_lightning.data.prepare import Statistics, TokenizedDataset
from phi3_lightning.data.sampler import BatchLoader, ElasticResume, PlannedBatches, RankAssignment, compare_orders
from phi3_lightning.data.sources import find_sources
from phi3_lightning.data.splits import (
    data_seed,
    load_template,
    make_encoder,
    model_context_length,
    plan_documents,
    plan_split,
    prepare_split,
    share_out,
)
from phi3_lightning.data.streaming import StreamedBatches, StreamLoader, check_trainer
from phi3_lightning.errors import ConfigError, DivergenceError
from phi3_lightning.renamed import translated


class ChatDataModule(LightningDataModule):
    """Chats, tokenised once, as batches in which exactly the assistant's tokens are supervised.

    Rows may be OpenAI ``messages``, ShareGPT ``conversations``, Alpaca's ``instruction`` and ``output``, ``prompt`` and
    ``completion``, plain ``text``, or ready-made ``input_ids`` and ``labels``; files JSON lines, a JSON array, CSV,
    Parquet or Arrow, packed with gzip or not.

    Args:
        **options: The fields of :class:`~phi3_lightning.config.DataConfig`, which says what each means.

    Attributes:
        tokenizer: The tokenizer, after ``setup``.
        template: Its chat template, after ``setup``.
        statistics: What became of the rows of each split.
        prepared: The tokenised documents of each split.
        plans: Which documents make a batch, for each split.

    Raises:
        ConfigError: A value is out of its range, or two contradict each other.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        check_names("data", DataConfig, options)
        self.options = DataConfig(**options)
        # Not logged: Lightning refuses to log a name, such as `revision`, that the module has too with another value.
        self.save_hyperparameters(asdict(self.options), logger=False)
        self.statistics: dict[Split, Statistics] = {}
        self.prepared: dict[Split, TokenizedDataset] = {}
        self.plans: dict[Split, Plan] = {}
        self._saved_order: dict[str, Any] | None = None
        self._resumed: ElasticResume | None = None
        self._tokens_per_batch: int | None = None  # what max_tokens_per_batch: auto has come to
        self._resharded = False  # by a module that restarts exactly; under any other, ranks must stay

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As Lightning's, also for checkpoints whose options had other names.

        Args:
            checkpoint_path: The file.
            *args: As in Lightning.
            **kwargs: As in Lightning.

        Returns:
            A data module with the options of the checkpoint.
        """
        return super().load_from_checkpoint(translated(checkpoint_path), *args, **kwargs)

    @classmethod
    def from_config(cls, config: DataConfig) -> Self:
        """Make a data module of options that are ready.

        Args:
            config: The options.

        Returns:
            A data module.
        """
        return cls(**asdict(config))

    def validate_sources(self) -> None:
        """Check, before anything is loaded, that every file can be read and that rows fit the model.

        Raises:
            DataError: A file is missing, empty or not readable.
            ConfigError: ``max_length`` is beyond the model's window.
        """
        for split in self.options.needed(None):
            find_sources(self.options.files(split) or [], split)
        model_context_length(self.options)

    def prepare_data(self) -> None:
        """Tokenise into the cache. Lightning calls this in one process a node.

        Raises:
            ConfigError: Something that is needed was not given.
            DataError: Rows cannot be used.
        """
        self.validate_sources()
        stage = None if self.trainer is None else self.trainer.state.fn
        window, template = model_context_length(self.options), load_template(self.options)
        for split in self.options.prepared(stage):
            prepare_split(split, self.options, make_encoder(split, self.options, template, window))

    def setup(self, stage: str | None = None) -> None:
        """Map the tokenised data and plan the batches, in every process alike.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None: all that data were given for.
        """
        self._window = model_context_length(self.options)
        self.template = load_template(self.options)
        self.tokenizer = self.template.tokenizer
        if stage == "fit":
            self._tokens_per_batch = None  # each Trainer decides anew
        for split in self.options.prepared(stage):
            if split not in self.prepared:
                self._set_up(split)
                if split == "train" and stage != "validate" and not self.awaits_batch_size:
                    self._report_plan()

    @property
    def awaits_batch_size(self) -> bool:
        """Whether ``max_tokens_per_batch`` is auto and not decided yet; until then ``batch_size`` counts."""
        return self.options.max_tokens_per_batch == "auto" and self._tokens_per_batch is None

    def set_tokens_per_batch(self, tokens: int) -> None:
        """Decide ``max_tokens_per_batch: auto``, and plan the batches anew.

        Args:
            tokens: Tokens of a micro-batch at the most, padding included.
        """
        self._tokens_per_batch = tokens
        self._plan_anew()
        if "train" in self.plans:
            self._report_plan()

    @property
    def train_documents(self) -> int:
        """Documents that are trained in an epoch."""
        return len(self.plans["train"].documents)

    @property
    def train_rows(self) -> int:
        """Rows, packed or not, that are trained in an epoch."""
        return len(self.plans["train"].rows) - 1

    @property
    def batch_size(self) -> int:
        """Rows of a micro-batch; after a change, as by Lightning's ``BatchSizeFinder``, batches are planned anew."""
        return self.options.batch_size

    @batch_size.setter
    def batch_size(self, rows: int) -> None:
        if self.trainer is not None and self.trainer.state.fn == "predict":
            raise ConfigError("data.batch_size: predict goes by predict_batch_size; give batch_arg_name that name.")
        if self.options.max_tokens_per_batch is not None:
            raise ConfigError(
                "data.batch_size: data.max_tokens_per_batch stands in its place; set that to null, or to auto, which "
                "finds what fits into memory by itself."
            )
        self._change_size("batch_size", rows)

    @property
    def predict_batch_size(self) -> int:
        """Prompts that are answered together; after a change, batches are planned anew."""
        return self.options.predict_batch_size

    @predict_batch_size.setter
    def predict_batch_size(self, prompts: int) -> None:
        self._change_size("predict_batch_size", prompts)

    def _change_size(self, name: str, size: int) -> None:
        change: dict[str, Any] = {name: size}
        self.options = replace(self.options, **change)
        self.hparams.update(change)
        self._plan_anew()
        if self.trainer is not None and self.trainer._active_loop is not None:
            self.trainer._active_loop._combined_loader = None  # BatchSizeFinder does so too, but for its first size

    def train_dataloader(self) -> BatchLoader:
        """Batches of the training data, in an order that seed and epoch decide.

        Returns:
            Yields ``Batch``.

        Raises:
            ConfigError: A stream has no end, and the Trainer was told none; or nothing in the Trainer decides
                ``max_tokens_per_batch: auto``.
        """
        if self.trainer is not None and self.awaits_batch_size:
            raise ConfigError(
                "data.max_tokens_per_batch: auto is decided by phi3_lightning.callbacks.AutoBatchSize, a callback that "
                "this Trainer does not have; add AutoBatchSize() to its callbacks, or give a number."
            )
        if self.options.streaming:
            return self._stream()
        return self._loader("train", shuffle=True)

    def largest_train_batch(self) -> Batch | None:
        """Return the training batch with the most tokens, in any epoch; None of a stream, where nobody knows."""
        if self.options.streaming:
            return None
        return self._largest(self.plans["train"])

    def largest_train_row(self) -> Batch:
        """Return the training row with the most tokens, in a batch of its own; of a stream, a full row."""
        if self.options.streaming:
            return collate([full_row(self.options.max_length)], self._pad())
        plan = self.plans["train"]
        return self._largest(replace(plan, batches=np.arange(len(plan.rows))))

    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """Batches of the validation data, longest first.

        Returns:
            Yields ``Batch``; an empty list where there is nothing to validate on.
        """
        if "val" not in self.plans:
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # that was the intention
            return []
        return self._loader("val")

    def test_dataloader(self) -> BatchLoader:
        """Batches of the test data, or else of the validation data, longest first.

        Returns:
            Yields ``Batch``.

        Raises:
            ConfigError: There are neither.
        """
        if self.options.tested not in self.plans:
            raise ConfigError("data.test: not given, and no validation rows are left to test with; name a file.")
        return self._loader(self.options.tested)

    def predict_dataloader(self) -> BatchLoader:
        """Batches of prompts, longest first.

        Returns:
            Yields ``PromptBatch``, whose ``document_ids`` tell the order of the file.
        """
        return self._loader("predict")

    def describe_rows(self, document_ids: list[int]) -> list[str]:
        """Say where training documents came from.

        Args:
            document_ids: What batches carry as ``document_ids``.

        Returns:
            A place a document, such as ``chats.jsonl:12``.
        """
        return (
            self._streamed.describe(document_ids)
            if self.options.streaming
            else self.prepared["train"].describe(document_ids)
        )

    def test_facts(self) -> dict[str, Any]:
        """What a report says of the data that ``test`` takes.

        Returns:
            ``source``, in words, and the ``statistics`` of the splits that were read, as plain types.
        """
        told = {
            "test": f"data.test: {self.options.test}",
            "val": "the validation data, since data.test is not given; the best checkpoint was chosen by them",
        }
        statistics = {split: asdict(found) for split, found in self.statistics.items()}
        return {"source": told[self.options.tested], "statistics": statistics}

    def origins(self, stage: Literal["validate", "test", "predict"], document_ids: list[int]) -> list[Origin]:
        """Say where documents that ``validate``, ``test`` or ``predict`` takes came from.

        Args:
            stage: Which of them.
            document_ids: What batches carry as ``document_ids``.

        Returns:
            Place and own id of the row of each.
        """
        splits: dict[str, Split] = {"validate": "val", "test": self.options.tested, "predict": "predict"}
        return self.prepared[splits[stage]].origins(document_ids)

    def on_exception(self, exception: BaseException) -> None:
        """Name the rows in which training diverged.

        Args:
            exception: What stopped the run.
        """
        if isinstance(exception, DivergenceError) and exception.document_ids:
            places = self.describe_rows(exception.document_ids)
            exception.add_note("Rows of this step: " + ", ".join(dict.fromkeys(places)))

    def checkpoint_identity(self) -> dict[str, str]:
        """What ties a checkpoint to the tokens that it was trained on.

        Returns:
            Hashes of ``tokenizer`` and ``template``.
        """
        return self.template.identity

    def state_dict(self) -> dict[str, Any]:
        """What decides the order of batches, so that a resumed run can tell whether it is the same, and the statistics.

        Returns:
            Seed, a fingerprint of the plan, ranks, where an epoch went on with another number of them, and what became
            of the rows; nothing without training data.
        """
        if "train" not in self.plans:
            return {}
        return self._order() | {
            "ranks": self._ranks()["num_replicas"],
            "resumed": None if self._resumed is None else asdict(self._resumed),
            "statistics": {split: asdict(found) for split, found in self.statistics.items()},
        }

    def reshard_progress(self, state: Mapping[str, Any], epoch: int, position: int, window: int) -> int:
        """Let the ranks that there are now take what is left of an epoch, each row once.

        Args:
            state: What ``state_dict`` returned when the checkpoint was written.
            epoch: Which epoch.
            position: Batches of each rank that were over.
            window: Batches of an accumulation window now.

        Returns:
            Batches of each rank that are over, as they are counted now.
        """
        order = self._order()
        if any(state.get(key) != order[key] for key in order):
            return position  # another order, which is looked at when the epoch begins to be read
        self._resharded = True
        before = None if state.get("resumed") is None else ElasticResume(**state["resumed"])
        shares = RankAssignment(
            len(self.plans["train"]), state["ranks"], before if before and before.epoch == epoch else None
        )
        now = shares.go_on(self._ranks()["num_replicas"], epoch, position, window)
        self._resumed = now.resumed
        return position if now is shares else now.begin

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint says about the order until training goes on from it.

        Args:
            state_dict: What ``state_dict`` returned.
        """
        self._saved_order = state_dict

    def _order(self) -> dict[str, Any]:
        plan = self.plans["train"].fingerprint()
        decided = {} if self._tokens_per_batch is None else {"max_tokens_per_batch": self._tokens_per_batch}
        return {"seed": data_seed(self.options), **decided, "plan": plan}

    def _set_up(self, split: Split) -> None:
        encoder = make_encoder(split, self.options, self.template, self._window)
        prepared = prepare_split(split, self.options, encoder)
        self.statistics[split] = prepared.statistics
        for name, files in prepared.files().items():
            rank_zero_info(f"{split}: {name}: {files}")
        rank_zero_info(f"{split}: {prepared.statistics}")
        if unused := name_unused(prepared.statistics.unused):
            rank_zero_info(f"{split}: fields that are not used: {unused}")
        for share, documents in share_out(split, prepared, self.options, data_seed(self.options)).items():
            self.prepared[share] = prepared
            self._plan(share, documents)

    def _plan(self, split: Split, documents: Ints) -> None:
        self.plans[split] = plan_documents(split, self.prepared[split], documents, self._batching(), self._window)

    def _plan_anew(self) -> None:
        for split, plan in self.plans.items():
            self._plan(split, np.sort(plan.documents))

    def _batching(self) -> DataConfig:
        """The options, with what ``max_tokens_per_batch: auto`` has come to."""
        decided = self._tokens_per_batch
        return self.options if decided is None else replace(self.options, max_tokens_per_batch=decided)

    def _largest(self, plan: Plan) -> Batch:
        """The batch of a plan of training rows that has the most tokens."""
        prepared = self.prepared["train"]
        rows = PlannedBatches(prepared, plan, partial(collate, pad_token_id=self._pad()))
        return cast("Batch", rows[int(plan.tokens(prepared.lengths()).argmax())])

    def _report_plan(self) -> None:
        plan = self.plans["train"]
        tokens = self.prepared["train"].lengths()[plan.documents].sum()
        full = f", {tokens / (self.train_rows * self.options.max_length):.1%} full" if self.options.packing else ""
        rank_zero_info(f"train: {self.train_documents} documents in {self.train_rows} rows{full}, {len(plan)} batches")

    def _batches(self, split: Split) -> PlannedBatches:
        make: Any = partial(collate, pad_token_id=self._pad())
        if split == "predict":
            make = partial(_collate_prompt_rows, pad_token_id=self._pad(), stop_ids=self.template.stop_ids)
        return PlannedBatches(self.prepared[split], self.plans[split], make)

    def _loader(self, split: Split, *, shuffle: bool = False) -> BatchLoader:
        return batch_loader(
            self._batches(split),
            seed=data_seed(self.options),
            shuffle=shuffle,
            position=self._start if split == "train" else lambda: 0,
            resumed=lambda: self._resumed if split == "train" else None,
            num_workers=self.options.num_workers,
            **self._ranks(),
        )

    def _stream(self) -> StreamLoader:
        """The training data as they come."""
        if self.trainer is not None:
            validates = self.options.val is not None
            check_trainer(self.trainer.max_steps, self.trainer.val_check_interval, validates=validates)
        self._streamed = StreamedBatches(
            find_sources(self.options.files("train") or [], streaming=True),
            make_encoder("train", self.options, self.template, self._window),
            partial(plan_split, "train", options=self._batching(), window=self._window),
            partial(collate, pad_token_id=self._pad()),
            seed=data_seed(self.options),
            skip_bad_rows=self.options.on_bad_row == "skip",
            **self._ranks(),
        )
        return stream_loader(self._streamed, position=self._position, num_workers=self.options.num_workers)

    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else pad

    def _ranks(self) -> dict[str, int]:
        several = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return {"num_replicas": 1, "rank": 0} if several is None else several

    def _position(self) -> int:
        return 0 if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _start(self) -> int:
        """The position, when an epoch begins to be read: now it is known whether it goes on where a checkpoint was."""
        self._check_resumed_order()
        return self._position()

    def _check_resumed_order(self) -> None:
        saved, self._saved_order = self._saved_order, None
        if saved and self.trainer is not None:
            progress = self.trainer.fit_loop.epoch_loop.batch_progress
            now = self._order() | ({} if self._resharded else {"ranks": self._ranks()["num_replicas"]})
            within = progress.current.ready > 0 and not progress.is_last_batch
            if changed := compare_orders(saved, now, within_epoch=within):
                rank_zero_info(f"The order of batches is new from this epoch on: {changed}.")


def _collate_prompt_rows(rows: list[list[Document]], pad_token_id: int, stop_ids: list[int]) -> PromptBatch:
    return collate_prompts([prompt for row in rows for prompt in row], pad_token_id, stop_ids)
