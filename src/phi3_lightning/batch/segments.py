"""Tokens as text, in pieces by what becomes of them, such that the pieces together are the text of the whole."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple


class Segment(NamedTuple):
    """Neighbouring tokens that are treated alike.

    Args:
        text: What they say.
        ids: The tokens.
        trained: Whether they are supervised.
        special: Whether it is a special token, which stands alone.
    """

    text: str
    ids: list[int]
    trained: bool
    special: bool


def segments(ids: Sequence[int], trained: Sequence[bool], tokenizer: Any) -> list[Segment]:
    """Divide tokens by what becomes of them.

    A tokenizer reads the text between two added tokens, such as ``<|user|>``, by itself, so it is decoded as a whole
    and then cut: a piece of it decoded alone loses its first blank, and a character whose bytes are several tokens.
    Half a character belongs to the piece that ends it.

    Args:
        ids: The tokens.
        trained: Whether each of them is supervised.
        tokenizer: Turns them into text.

    Returns:
        All of the tokens, in order.
    """
    added = tokenizer.added_tokens_decoder
    found: list[Segment] = []
    pairs = list(zip(ids, trained, strict=True))
    for at, run in groupby(range(len(ids)), key=lambda at: at if ids[at] in added else -1):
        tokens = [pairs[position] for position in run]
        texts = _Texts([token for token, _ in tokens], tokenizer)
        for is_trained, part in groupby(tokens, key=lambda token: bool(token[1])):
            own = [token for token, _ in part]
            found.append(Segment(texts.next(len(own)), own, is_trained, at >= 0 and bool(added[ids[at]].special)))
    return found


class _Texts:
    """The text of some tokens, piece by piece."""

    def __init__(self, ids: list[int], tokenizer: Any) -> None:
        self._ids = ids
        self._tokenizer = tokenizer
        self._whole = self._decoded(len(ids))
        self._read = self._shown = 0

    def next(self, count: int) -> str:
        """Return the text of the next few tokens."""
        self._read += count
        before = self._whole if self._read == len(self._ids) else self._decoded(self._read)
        text = self._whole[self._shown : _common(self._whole, before)]
        self._shown += len(text)
        return text

    def _decoded(self, count: int) -> str:
        return str(self._tokenizer.decode(self._ids[:count], clean_up_tokenization_spaces=False))


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))
