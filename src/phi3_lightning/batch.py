"""What data and model share: the two kinds of batch, where their rows came from, and what each asks the other."""

from typing import Any, Final, Literal, NamedTuple, Protocol, TypedDict, runtime_checkable

from torch import Tensor

__all__ = ["IGNORE_INDEX", "AutoSizedData", "Batch", "PlannedData", "PromptBatch"]

IGNORE_INDEX: Final = -100
"""The label of a token that is not trained (the value that ``torch.nn.functional.cross_entropy`` ignores)."""


class Batch(TypedDict):
    """Rows for training and evaluation. A row holds one document, or several that do not see each other.

    Attributes:
        input_ids: Token ids, right padded, shape (rows, length), int64.
        labels: ``input_ids`` where the token is supervised and ``IGNORE_INDEX`` elsewhere, unshifted,
            shape (rows, length), int64. The first token of a document is never supervised.
        position_ids: Positions that restart at 0 at each document, and 0 on padding,
            shape (rows, length), int64.
        lengths: Tokens of each document, row by row; what lies beyond their sum is padding.
            A filler row, which evens out ranks, has no document and no label.
        row_ids: Where each document came from, row by row: its index in the tokenised data set.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    lengths: list[list[int]]
    row_ids: list[list[int]]


class PromptBatch(TypedDict):
    """Prompts for generation.

    Attributes:
        input_ids: Token ids, left padded, shape (prompts, length), int64.
        attention_mask: 1 on prompt tokens and 0 on padding, shape (prompts, length), int64.
        row_ids: The index of each prompt in its file.
        stop_ids: The tokens that end an answer.
    """

    input_ids: Tensor
    attention_mask: Tensor
    row_ids: list[int]
    stop_ids: list[int]


def unpadded(batch: PromptBatch) -> list[list[int]]:
    """Return the tokens of each prompt.

    Args:
        batch: Prompts.
    """
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


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
class HasOrigins(Protocol):
    """A data module that says where its rows come from."""

    def origins(self, stage: Literal["test", "predict"], row_ids: list[int]) -> list[Origin]:
        """Return where documents came from that ``test`` or ``predict`` takes."""


def origins(data: object, stage: Literal["test", "predict"], row_ids: list[int]) -> list[Origin]:
    """Return where documents came from; their numbers where the data module does not say.

    Args:
        data: The data module, if there is one.
        stage: Who takes the documents.
        row_ids: What batches carry as ``row_ids``.
    """
    if isinstance(data, HasOrigins):
        return data.origins(stage, row_ids)
    return [Origin(f"row {row}") for row in row_ids]


@runtime_checkable
class PlannedData(Protocol):
    """A data module that knows its batches before they are read."""

    def largest_train_batch(self) -> Batch | None:
        """Return the training batch with the most tokens; None where that is not known."""


@runtime_checkable
class AutoSizedData(Protocol):
    """A data module whose training batches can be as large as memory allows."""

    @property
    def hparams(self) -> Any:
        """What it was configured with, of which ``batch_size`` and ``max_length`` count, as Lightning keeps it."""

    @property
    def awaits_batch_size(self) -> bool:
        """Whether the size of training batches is to be decided, and is not decided yet."""

    def largest_train_row(self) -> Batch:
        """Return the training row with the most tokens, in a batch of its own."""

    def set_tokens_per_batch(self, tokens: int) -> None:
        """Plan batches of so many tokens at the most, padding included."""
