"""Texts become tokens word by word, several times as fast, where a tokenizer's vocabulary proves words independent.

SentencePiece's kind of tokenizer, Phi-3's among them, merges characters over a whole text. Where no token of the
vocabulary reaches from the end of a word into the next, no merge can: a text's tokens are those of its words, and most
words have been seen before.
"""

import json
import re
from bisect import bisect_right
from itertools import chain
from typing import Any, Final

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from phi3_lightning.data.sentinels import Rendered

_SPACE: Final = "\u2581"  # what the normalizer writes for a space
_NORMALIZER: Final = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ],
}
# Unicode's White_Space, which a token with `rstrip` swallows; Python's \s has four control characters more
_WHITE: Final = (
    "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
)
_REMEMBERED: Final = 100_000  # words, in about 25 MB
_LONGEST: Final = 64  # characters of a word that is remembered


class Pieces:
    """The tokens of a text that is cut at its added tokens."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._tokens: list[int] = []

    def add(self, start: int, end: int, ids: list[int]) -> None:
        """Append a piece.

        Args:
            start: Its first character.
            end: The character behind it.
            ids: Its tokens.
        """
        if start < end:
            self._starts.append(start)
            self._ends.append(end)
            self._tokens.append(len(self.ids))
            self.ids += ids

    def char_to_token(self, char: int) -> int | None:
        """Return the first token of the piece that holds a character; None behind the end."""
        piece = bisect_right(self._starts, char) - 1
        return self._tokens[piece] if piece >= 0 and char < self._ends[piece] else None

    def token_to_chars(self, token: int) -> tuple[int, int]:
        """Return where the piece is whose first token is given."""
        piece = self._tokens.index(token)
        return self._starts[piece], self._ends[piece]


class WordCache:
    """Encodes by words.

    Args:
        tokenizer: One of which :func:`words_are_independent` is true.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        added = sorted(tokenizer.added_tokens_decoder.items(), key=lambda item: len(item[1].content), reverse=True)
        patterns = [re.escape(token.content) + (f"[{_WHITE}]*" if token.rstrip else "") for _, token in added]
        self._added = re.compile("|".join(patterns) or "(?!)")  # the longest that fits is taken
        self._added_ids = {token.content: index for index, token in added}
        self._special = {token.content for _, token in added if token.special}
        self._word = re.compile(f"[ {_SPACE}]*[^ {_SPACE}]+|[ {_SPACE}]+")
        self._ids = _WordIds(tokenizer.backend_tokenizer)

    def encode(self, rendered: Rendered) -> Pieces | None:
        """Tokenise a chat; special-token text within a content is plain text.

        Args:
            rendered: The chat as the template writes it.

        Returns:
            Its tokens; None where a content begins within a stretch of text instead of at or behind an added token,
            since which token is its first is not known then.
        """
        text, contents = rendered.text, rendered.contents
        begins = [start for start, _ in contents]
        pieces = Pieces()
        position = 0
        for match in self._added.finditer(text):
            start, token = match.start(), match.group().rstrip(_WHITE)
            begun = bisect_right(begins, start)
            if token in self._special and begun and start < contents[begun - 1][1]:
                continue
            if begun > bisect_right(begins, position):
                return None
            pieces.add(position, start, self._stretch(text[position:start]))
            position = match.end()
            pieces.add(start, position, [self._added_ids[token]])
        if len(begins) > bisect_right(begins, position):
            return None
        pieces.add(position, len(text), self._stretch(text[position:]))
        return pieces

    def _stretch(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self._ids.__getitem__, self._word.findall(f" {text}")))) if text else []


class _WordIds(dict[str, list[int]]):
    """The tokens of words, remembered."""

    def __init__(self, backend: Tokenizer) -> None:
        super().__init__()
        self._model: Any = backend.model

    def __missing__(self, word: str) -> list[int]:
        ids = [token.id for token in self._model.tokenize(word.replace(" ", _SPACE))]
        if len(word) <= _LONGEST:
            if len(self) >= _REMEMBERED:
                self.clear()
            self[word] = ids
        return ids


def words_are_independent(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokens of a text are those of its words, which is read from the tokenizer's definition.

    Args:
        tokenizer: Any tokenizer.

    Returns:
        True where it merges pairs of a vocabulary in which the space's mark only stands at the beginning of tokens,
        after no normalisation but that mark, and falls back to bytes instead of an unknown token.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model = definition["model"]
    if model["type"] != "BPE" or definition["normalizer"] != _NORMALIZER or definition["pre_tokenizer"] is not None:
        return False
    plain = not (model["dropout"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"])
    whole = model["byte_fallback"] and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    apart = all(_SPACE not in token.lstrip(_SPACE) for token in model["vocab"])
    found = not any(
        token["normalized"] or token["lstrip"] or token["single_word"] for token in definition["added_tokens"]
    )
    return plain and whole and apart and found
