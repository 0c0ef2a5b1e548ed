"""The two kinds of batch."""

from typing import Final, NotRequired, TypedDict

from torch import Tensor

IGNORE_INDEX: Final = -100
"""The label of a token that is not trained (the value that ``torch.nn.functional.cross_entropy`` ignores)."""


class Batch(TypedDict):
    """Rows for training and evaluation. A row holds one document, or several that do not see each other."""

    input_ids: Tensor
    """Token ids, right padded, shape (rows, length), int64."""
    labels: Tensor
    """``input_ids`` where the token is supervised and ``IGNORE_INDEX`` elsewhere, unshifted, shape (rows, length),
    int64. The first token of a document is never supervised."""
    position_ids: Tensor
    """Positions that restart at 0 at each document, and 0 on padding, shape (rows, length), int64."""
    document_lengths: list[list[int]]
    """Tokens of each document, row by row; what lies beyond their sum is padding. A filler row, which evens out ranks,
    has no document and no label."""
    document_ids: list[list[int]]
    """The index of each document in the tokenised data set, row by row."""
    preferred: NotRequired[list[list[bool]]]
    """For preferences: whether each document is the better answer of its pair, or for KTO a good answer, row by row.
    The chosen and the rejected answer of a pair are neighbours, in this order, and have the same document id."""
    shared_lengths: NotRequired[list[list[int]]]
    """For pairs: how many leading tokens a document has in common with the one before it, which a kernel may compute
    once, row by row; 0 on chosen answers. It is short of the token before the first supervised one of either."""


class PromptBatch(TypedDict):
    """Prompts for generation."""

    input_ids: Tensor
    """Token ids, left padded, shape (prompts, length), int64."""
    attention_mask: Tensor
    """1 on prompt tokens and 0 on padding, shape (prompts, length), int64."""
    document_ids: list[int]
    """The index of each prompt in its file."""
    stop_ids: list[int]
    """The tokens that end an answer."""
