"""Tokens as text, in segments of trained, untrained and special tokens that together are the text of the whole."""

from collections.abc import Sequence
from itertools import groupby
from os.path import commonprefix
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
    for at, run in groupby(range(len(ids)), key=lambda at: at if ids[at] in added else -1):
        special = at >= 0 and bool(added[ids[at]].special)
        positions = list(run)
        run_ids = [ids[position] for position in positions]
        whole = _decode(run_ids, tokenizer)
        token = char = 0  # where the next segment begins
        for is_trained, group in groupby(positions, key=lambda position: bool(trained[position])):
            segment_ids = [ids[position] for position in group]
            token += len(segment_ids)
            end = len(commonprefix([whole, _decode(run_ids[:token], tokenizer)]))  # noqa: RUF071, by character
            result.append(Segment(whole[char:end], segment_ids, is_trained, special))
            char = end
    return result


def _decode(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
