"""The two kinds of batch."""

from typing import Final, TypedDict

from torch import Tensor

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
        document_lengths: Tokens of each document, row by row; what lies beyond their sum is padding.
            A filler row, which evens out ranks, has no document and no label.
        document_ids: Where each document came from, row by row: its index in the tokenised data set.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    document_lengths: list[list[int]]
    document_ids: list[list[int]]


class PromptBatch(TypedDict):
    """Prompts for generation.

    Attributes:
        input_ids: Token ids, left padded, shape (prompts, length), int64.
        attention_mask: 1 on prompt tokens and 0 on padding, shape (prompts, length), int64.
        document_ids: The index of each prompt in its file.
        stop_ids: The tokens that end an answer.
    """

    input_ids: Tensor
    attention_mask: Tensor
    document_ids: list[int]
    stop_ids: list[int]
