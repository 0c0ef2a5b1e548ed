"""ChatDataModule: chat files in, batches out."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal, Self

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info

from phi3_lightning.batch import Batch
from phi3_lightning.config.checks import check_names
from phi3_lightning.config.data import DataConfig, Split
from phi3_lightning.contracts import Origin
from phi3_lightning.data.collate import Document, collate, full_row, pad_id
from phi3_lightning.data.kinds import FirstRow, check_one_kind, first_row
from phi3_lightning.data.loaders import NoBatches, collate_function, stream_loader, worker_options
from phi3_lightning.data.own_rows import own_rows
from phi3_lightning.data.plans import SplitPlans
from phi3_lightning.data.resume import ResumedOrder, position_of, ranks_of
from phi3_lightning.data.sampler import BatchLoader, BatchOrder, PlannedBatches, RankAssignment
from phi3_lightning.data.sources import find_sources
from phi3_lightning.data.splits import (
    data_seed,
    describe_tested,
    load_template,
    make_encoder,
    model_context_length,
    prepare_split,
    report_rows,
)
from phi3_lightning.data.streaming import StreamLoader
from phi3_lightning.data.tokenized import Statistics
from phi3_lightning.errors import ConfigError, DivergenceError
from phi3_lightning.renamed import translated


class ChatDataModule(LightningDataModule):
    """Chats, tokenised once, as batches in which exactly the assistant's tokens are supervised.

    Rows may be OpenAI ``messages``, ShareGPT ``conversations``, Alpaca's ``instruction`` and ``output``, ``prompt`` and
    ``completion``, plain ``text``, or ready-made ``input_ids`` and ``labels``; preferences have ``chosen`` and
    ``rejected``, or a ``label`` beside a chat; files JSON lines, a JSON array, CSV, Parquet or Arrow, packed with gzip
    or not.

    Args:
        **options: The fields of :class:`~phi3_lightning.config.DataConfig`, which describes each.

    Attributes:
        options: The options.
        tokenizer: The tokenizer, after ``setup``.
        template: Its chat template, after ``setup``.
        statistics: What became of the rows of each split.
        prepared: The tokenised documents of each split.
        plans: Which documents make a batch, for each split.

    Raises:
        ConfigError: If a value is out of its range, or two contradict each other.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        check_names("data", DataConfig, options)
        self.options = DataConfig(**options)
        # Not logged: Lightning refuses to log a name, such as `revision`, that the module has too with another value.
        self.save_hyperparameters(asdict(self.options), logger=False)
        self.statistics: dict[Split, Statistics] = {}
        self._splits = SplitPlans(self.options)
        self.prepared, self.plans = self._splits.prepared, self._splits.plans
        self._resumed = ResumedOrder()
        self._first_rows: dict[Split, FirstRow | None] = {}

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Make a data module with the options of a checkpoint, whatever names they had when it was written."""
        return super().load_from_checkpoint(translated(checkpoint_path), *args, **kwargs)

    @classmethod
    def from_config(cls, config: DataConfig) -> Self:
        """Make a data module from a ``DataConfig``."""
        return cls(**asdict(config))

    def validate_sources(self) -> None:
        """Check, before anything is loaded, that every file can be read and that ``max_length`` fits the model."""
        for split in self.options.needed(None):
            streaming = self.options.streaming and split == "train"
            find_sources(self.options.files(split) or [], split, streaming=streaming)
        model_context_length(self.options)

    def first_rows(self) -> dict[Split, FirstRow]:
        """Return kind and place of the first row of training, validation and test data; of the hub's once prepared.

        Raises:
            ConfigError: If they are not of one kind.
        """
        for split in self.options.needed(None):
            if split in self.prepared:
                prepared = self.prepared[split]
                self._first_rows[split] = prepared.statistics.kind, prepared.describe([0])[0]
            elif split != "predict" and split not in self._first_rows:
                self._first_rows[split] = first_row(self.options, split)
        rows: dict[Split, FirstRow] = {split: row for split, row in self._first_rows.items() if row is not None}
        rows.pop("predict", None)
        check_one_kind(rows)
        return rows

    def prepare_data(self) -> None:
        """Tokenise into the cache. Lightning calls this in one process a node."""
        self.validate_sources()
        if (stage := None if self.trainer is None else self.trainer.state.fn) != "predict":
            self.first_rows()
        context_length, template = model_context_length(self.options), load_template(self.options)
        for split in self.options.prepared(stage):
            prepare_split(split, self.options, make_encoder(split, self.options, template, context_length))

    def setup(self, stage: str | None = None) -> None:
        """Map the tokenised data and plan the batches, alike in every process; None: for all stages that have data."""
        self._splits.context_length = model_context_length(self.options)
        self.template = load_template(self.options)
        self.tokenizer = self.template.tokenizer
        if stage == "fit":
            self._splits.reset(self.options)  # each Trainer decides max_tokens_per_batch: auto for itself
        for split in self.options.prepared(stage):
            if split not in self.prepared:
                encoder = make_encoder(split, self.options, self.template, self._splits.context_length)
                prepared = prepare_split(split, self.options, encoder)
                self.statistics[split] = prepared.statistics
                report_rows(split, prepared)
                self._splits.add(split, prepared)
                if split == "train" and stage != "validate" and not self.awaits_batch_size:
                    rank_zero_info(self._splits.describe_train())
        if stage != "predict":
            self.first_rows()

    @property
    def awaits_batch_size(self) -> bool:
        """Whether ``max_tokens_per_batch`` is auto and not decided yet; until then ``batch_size`` counts."""
        return self._splits.options.max_tokens_per_batch == "auto"

    def set_rows_per_batch(self, rows: int, validation_tokens: int | None) -> None:
        """Decide ``max_tokens_per_batch: auto``, in validation for itself, and plan the batches again."""
        self._splits.decide(rows, validation_tokens, ranks_of(self.trainer)["num_replicas"])
        if "train" in self.plans:
            rank_zero_info(self._splits.describe_train())

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
        """Rows of a micro-batch; a change, as by Lightning's ``BatchSizeFinder``, plans the batches again."""
        return self.options.batch_size

    @batch_size.setter
    def batch_size(self, rows: int) -> None:
        if self.trainer is not None and self.trainer.state.fn == "predict":
            raise ConfigError("data.batch_size: predict uses predict_batch_size; give batch_arg_name that name")
        if self.options.max_tokens_per_batch is not None:
            raise ConfigError(
                "data.batch_size: data.max_tokens_per_batch replaces it; set that to null, or to auto, which "
                "finds what fits into memory by itself"
            )
        self._change_size("batch_size", rows)

    @property
    def predict_batch_size(self) -> int:
        """Prompts that are answered together; a change plans the batches again."""
        return self.options.predict_batch_size

    @predict_batch_size.setter
    def predict_batch_size(self, prompts: int) -> None:
        self._change_size("predict_batch_size", prompts)

    def _change_size(self, name: str, size: int) -> None:
        change: dict[str, Any] = {name: size}
        self.options = replace(self.options, **change)
        self.hparams.update(change)
        self._splits.replan(**change)
        if self.trainer is not None and self.trainer._active_loop is not None:
            self.trainer._active_loop._combined_loader = None  # BatchSizeFinder does this, but not for its first size

    def train_dataloader(self) -> BatchLoader:
        """Return batches of the training data, in an order that seed and epoch determine.

        Raises:
            ConfigError: If a run on a stream has no end, or nothing in the Trainer decides
                ``max_tokens_per_batch: auto``.
        """
        if self.trainer is not None and self.awaits_batch_size:
            raise ConfigError(
                "data.max_tokens_per_batch: auto is decided by phi3_lightning.callbacks.AutoBatchSize, a callback that "
                "this Trainer does not have; add AutoBatchSize() to its callbacks, or give a number"
            )
        if not self.options.streaming:
            return self._loader("train")
        loader = self._stream()
        self._streamed = loader.dataset
        return loader

    def val_dataloader(self) -> BatchLoader | NoBatches:
        """Return batches of the validation data, longest first; none where there is nothing to validate on."""
        return self._loader("val") if "val" in self.plans else NoBatches()

    def test_dataloader(self) -> BatchLoader:
        """Return batches of the test data, or else of the validation data, longest first."""
        if self.options.tested not in self.plans:
            raise ConfigError("data.test: not given, and no validation rows are left to test with; name a file")
        return self._loader(self.options.tested)

    def predict_dataloader(self) -> BatchLoader:
        """Return batches of prompts, longest first; their ``document_ids`` give the order of the file."""
        return self._loader("predict")

    def largest_train_batch(self) -> Batch | None:
        """Return the training batch with the most tokens, the same in every epoch; None of a stream: not known."""
        if self.options.streaming:
            return None
        return self._splits.largest_train_batch(self._collate("train"))

    def largest_train_row(self) -> Batch:
        """Return the training row with the most tokens, in a batch of its own; of a stream, a full row."""
        if self.options.streaming:
            return collate([full_row(self.options.max_length, self._stream().dataset.kind())], pad_id(self.tokenizer))
        return self._splits.largest_train_batch(self._collate("train"), single_row=True)

    def _collate(self, split: Split) -> Callable[[list[list[Document]]], Any]:
        return collate_function(split, self.template, self.prepared[split].statistics.kind)

    def _stream(self) -> StreamLoader:
        return stream_loader(self._splits.options, self.template, self._splits.context_length, self.trainer)

    def _loader(self, split: Split) -> BatchLoader:
        train = split == "train"
        batches = PlannedBatches(self.prepared[split], self.plans[split], self._collate(split))
        order = BatchOrder(
            batches.indices,
            seed=data_seed(self.options),
            shuffle=train,
            position=self._start if train else lambda: 0,
            resumed=lambda: self._resumed.elastic if train else None,
            **ranks_of(self.trainer),
        )
        return BatchLoader(batches, batch_size=None, sampler=order, **worker_options(self.options.num_workers))

    def _start(self) -> int:
        """The position, at the moment when an epoch is first read: now it is known whether it resumes a checkpoint."""
        if self.trainer is not None:
            self._resumed.check(self._splits.order(), self.trainer)
        return position_of(self.trainer)

    def describe_rows(self, document_ids: list[int]) -> list[str]:
        """Return where the training documents of batches came from, such as ``chats.jsonl:12``."""
        return (self._streamed if self.options.streaming else self.prepared["train"]).describe(document_ids)

    def test_facts(self) -> dict[str, Any]:
        """Return ``source``, a description of the test data, and the ``statistics`` of the splits as plain types."""
        return {"source": describe_tested(self.options), "statistics": self._plain_statistics()}

    def _plain_statistics(self) -> dict[str, Any]:
        return {split: asdict(statistics) for split, statistics in self.statistics.items()}

    def origins(self, stage: Literal["validate", "test", "predict"], document_ids: list[int]) -> list[Origin]:
        """Return place and own id of the rows of documents in batches of a stage."""
        return self._splits.of_stage(stage).origins(document_ids)

    def rows(self, stage: Literal["validate", "test", "predict"], document_ids: list[int]) -> list[dict[str, Any]]:
        """Return the rows of documents in batches of a stage, with all the fields that their files have."""
        return own_rows(self._splits.of_stage(stage), document_ids, self.options)

    def on_exception(self, exception: BaseException) -> None:
        """Name the rows in which training diverged."""
        if isinstance(exception, DivergenceError) and exception.document_ids:
            places = self.describe_rows(exception.document_ids)
            exception.add_note("Rows of this step: " + ", ".join(dict.fromkeys(places)))

    def checkpoint_identity(self) -> dict[str, str]:
        """Return hashes of ``tokenizer`` and ``template``, which tie a checkpoint to its tokens."""
        return self.template.identity

    def state_dict(self) -> dict[str, Any]:
        """Return what determines the order of batches, and the statistics; nothing without prepared training data."""
        if "train" not in self.plans:
            return {}
        state = self._resumed.state_dict(self._splits.order(), ranks_of(self.trainer)["num_replicas"])
        return state | {"statistics": self._plain_statistics()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the order of a checkpoint until training resumes from it."""
        self._resumed.load_state_dict(state_dict)

    def reshard_progress(self, state: Mapping[str, Any], epoch: int, position: int, window: int) -> int:
        """Share the rest of an epoch among the present ranks; see ``ResumedOrder.reshard``."""
        now = RankAssignment(len(self.plans["train"]), ranks_of(self.trainer)["num_replicas"])
        return self._resumed.reshard(state, self._splits.order(), now, epoch, position, window)
