"""Tokens as text, in segments of trained, untrained and special tokens that together are the text of the whole."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple


class Segment(NamedTuple):
    """Neighbouring tokens of one kind."""

    text: str
    ids: list[int]
    trained: bool
    """Whether the tokens are supervised."""
    special: bool
    """Whether this is a special token, which is a segment of its own."""


def segments(ids: Sequence[int], trained: Sequence[bool], tokenizer: Any) -> list[Segment]:
    """Split tokens into segments, in order.

    The text between two added tokens, such as ``<|user|>``, is decoded as a whole and then split: a segment that is
    decoded alone loses its first space, and a character whose bytes are several tokens. A character that two segments
    share belongs to the one that ends it.
    """
    added = tokenizer.added_tokens_decoder
    result: list[Segment] = []
    pairs = list(zip(ids, trained, strict=True))
    for at, run in groupby(range(len(ids)), key=lambda at: at if ids[at] in added else -1):
        tokens = [pairs[position] for position in run]
        texts = _Texts([token for token, _ in tokens], tokenizer)
        for is_trained, group in groupby(tokens, key=lambda token: bool(token[1])):
            segment_ids = [token for token, _ in group]
            special = at >= 0 and bool(added[ids[at]].special)
            result.append(Segment(texts.next(len(segment_ids)), segment_ids, is_trained, special))
    return result


class _Texts:
    """Decodes tokens segment by segment."""

    def __init__(self, ids: list[int], tokenizer: Any) -> None:
        self._ids = ids
        self._tokenizer = tokenizer
        self._whole = self._decode(len(ids))
        self._token = self._char = 0  # where the next segment begins

    def next(self, count: int) -> str:
        """Return the text of the next ``count`` tokens."""
        self._token += count
        prefix = self._whole if self._token == len(self._ids) else self._decode(self._token)
        text = self._whole[self._char : _common_length(self._whole, prefix)]
        self._char += len(text)
        return text

    def _decode(self, count: int) -> str:
        return str(self._tokenizer.decode(self._ids[:count], clean_up_tokenization_spaces=False))


def _common_length(one: str, other: str) -> int:
    """The number of characters with which both texts begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))
