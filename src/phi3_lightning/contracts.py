"""What callbacks and checkpoints ask of a data module. One of another project may answer neither, and still trains."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from phi3_lightning.batch import Batch

__all__ = ["DescribedData", "HasTokenizer", "Origin", "PlannedData"]


class Origin(NamedTuple):
    """Where a document came from.

    Args:
        place: Its file and line, such as ``chats.jsonl:12``.
        id: Its row's own ``id``; None: it has none.
    """

    place: str
    id: str | int | float | None = None

    def content(self) -> dict[str, Any]:
        """Return what a line of JSON says of it: ``place``, and ``id`` where there is one."""
        return {"place": self.place} | ({} if self.id is None else {"id": self.id})


@runtime_checkable
class DescribedData(Protocol):
    """A data module that can say what its rows are, for reports and predictions."""

    def origins(self, stage: Literal["validate", "test", "predict"], document_ids: list[int]) -> list[Origin]:
        """Return where documents came from that a stage takes."""

    def test_facts(self) -> dict[str, Any]:
        """Return ``source``, the test data in words, and the ``statistics`` of the splits."""


@runtime_checkable
class PlannedData(Protocol):
    """A data module that knows its batches before they are read, for what is ``auto`` and for exact restarts."""

    @property
    def hparams(self) -> Any:
        """What it was configured with, of which ``batch_size`` and ``max_length`` count, as Lightning keeps it."""

    @property
    def awaits_batch_size(self) -> bool:
        """Whether the size of training batches is to be decided, and is not decided yet."""

    def largest_train_batch(self) -> Batch | None:
        """Return the training batch with the most tokens; None where that is not known."""

    def largest_train_row(self) -> Batch:
        """Return the training row with the most tokens, in a batch of its own."""

    def set_tokens_per_batch(self, tokens: int) -> None:
        """Plan batches of so many tokens at the most, padding included."""

    def checkpoint_identity(self) -> dict[str, str]:
        """Return hashes of ``tokenizer`` and ``template``, which tie a checkpoint to its tokens."""

    def reshard_progress(self, state: Mapping[str, Any], epoch: int, position: int, window: int) -> int:
        """Return how many batches of each rank are over, as ranks and accumulation windows are counted now."""


@runtime_checkable
class HasTokenizer(Protocol):
    """A data module whose token ids can be read."""

    tokenizer: Any


def origins(data: object, stage: Literal["validate", "test", "predict"], document_ids: list[int]) -> list[Origin]:
    """Return where documents came from; their numbers where the data module does not say.

    Args:
        data: The data module, if there is one.
        stage: Who takes the documents.
        document_ids: What batches carry as ``document_ids``.
    """
    if isinstance(data, DescribedData):
        return data.origins(stage, document_ids)
    return [Origin(f"row {document_id}") for document_id in document_ids]
