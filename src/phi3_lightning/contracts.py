"""What callbacks and checkpoints use of a data module; one of another project may lack it all, and still trains."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import lightning.pytorch as pl

from phi3_lightning.batch import Batch

__all__ = ["DataOfOneKind", "DescribedData", "HasTokenizer", "Origin", "PlannedData"]


class Origin(NamedTuple):
    """Where a document came from."""

    place: str
    """File and line, such as ``chats.jsonl:12``."""
    id: str | int | float | None = None
    """The row's own ``id``, if it has one."""

    def content(self) -> dict[str, Any]:
        """Return the fields for a line of JSON: ``place``, and ``id`` where there is one."""
        return {"place": self.place} | ({} if self.id is None else {"id": self.id})


@runtime_checkable
class DescribedData(Protocol):
    """A data module that knows the origin of its rows, for reports and predictions."""

    def origins(self, stage: Literal["validate", "test", "predict"], document_ids: list[int]) -> list[Origin]:
        """Return where documents of a stage came from."""

    def test_facts(self) -> dict[str, Any]:
        """Return ``source``, a description of the test data, and the ``statistics`` of the splits."""


@runtime_checkable
class PlannedData(Protocol):
    """A data module that knows its batches in advance, for settings that are ``auto`` and for exact restarts."""

    @property
    def hparams(self) -> Any:
        """The hyper-parameters that Lightning keeps; ``batch_size`` is read."""

    @property
    def awaits_batch_size(self) -> bool:
        """Whether the size of training batches still has to be decided."""

    def largest_train_batch(self) -> Batch | None:
        """Return the training batch with the most tokens; None where it is not known."""

    def largest_train_row(self) -> Batch:
        """Return the training row with the most tokens, in a batch of its own."""

    def set_rows_per_batch(self, rows: int, validation_tokens: int | None) -> None:
        """Plan batches of so many rows, and those of validation by tokens, padding included, where that is more."""

    def checkpoint_identity(self) -> dict[str, str]:
        """Return hashes of ``tokenizer`` and ``template``, which tie a checkpoint to its tokens."""

    def reshard_progress(self, state: Mapping[str, Any], epoch: int, position: int, window: int) -> int:
        """Return how many batches of each rank are done, for the present number of ranks and accumulation window."""


@runtime_checkable
class DataOfOneKind(Protocol):
    """A data module that knows what its rows are, which a model's objective has to learn from."""

    @property
    def hparams(self) -> Any:
        """The hyper-parameters that Lightning keeps; what decides the size of batches is read."""

    def first_rows(self) -> Mapping[Any, tuple[str, str]]:
        """Return kind (``chat``, ``pair`` or ``labelled``) and place of a row of each split, where they are known."""


@runtime_checkable
class HasTokenizer(Protocol):
    """A data module whose tokenizer turns its token ids into text."""

    tokenizer: Any


def data_module(trainer: pl.Trainer) -> Any:
    """Return the data module that a Trainer runs with, or None; Lightning's types do not know it."""
    return trainer.datamodule  # type: ignore[attr-defined]


def origins(data: object, stage: Literal["validate", "test", "predict"], document_ids: list[int]) -> list[Origin]:
    """Return where documents of a stage came from; by number where there is no data module or it does not know."""
    if isinstance(data, DescribedData):
        return data.origins(stage, document_ids)
    return [Origin(f"row {document_id}") for document_id in document_ids]
