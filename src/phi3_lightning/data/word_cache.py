"""Tokenises texts word by word, several times as fast, where a tokenizer's vocabulary proves words independent.

Tokenizers of SentencePiece's kind, Phi-3's among them, merge characters over a whole text. Where no token of the
vocabulary reaches from the end of a word into the next, no merge can either: the tokens of a text are those of its
words, and most words have been seen before. ``ChatTemplate`` compares the first chats with the tokenizer's own tokens.
"""

import json
import re
from bisect import bisect_right
from itertools import chain
from typing import Any, Final

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from phi3_lightning.data.sentinels import Rendered

VERIFIED_CHATS: Final = 200
"""The chats of each preparation that are encoded by the tokenizer too, and compared."""

_SPACE: Final = "\u2581"  # what the normalizer writes for a space
_NORMALIZER: Final = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ],
}
# Unicode's White_Space, which a token with `rstrip` includes; Python's \s has four control characters more
_WHITE: Final = (
    "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
)
_MAX_WORDS: Final = 100_000  # in about 25 MB
_MAX_CHARACTERS: Final = 64  # of a word in the cache


class Pieces:
    """The tokens of a text that is cut at its added tokens."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._tokens: list[int] = []

    def add(self, start: int, end: int, ids: list[int]) -> None:
        """Append the tokens of the characters from ``start`` to before ``end``."""
        if start < end:
            self._starts.append(start)
            self._ends.append(end)
            self._tokens.append(len(self.ids))
            self.ids += ids

    def char_to_token(self, char: int) -> int | None:
        """Return the first token of the piece that holds a character; None past the end."""
        piece = bisect_right(self._starts, char) - 1
        return self._tokens[piece] if piece >= 0 and char < self._ends[piece] else None

    def token_to_chars(self, token: int) -> tuple[int, int]:
        """Return the characters of the piece that begins with a token."""
        piece = self._tokens.index(token)
        return self._starts[piece], self._ends[piece]


class WordCache:
    """Encodes chats word by word, with a tokenizer for which :func:`words_are_independent` is true."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        added = sorted(tokenizer.added_tokens_decoder.items(), key=lambda item: len(item[1].content), reverse=True)
        patterns = [re.escape(token.content) + (f"[{_WHITE}]*" if token.rstrip else "") for _, token in added]
        self._added = re.compile("|".join(patterns) or "(?!)")  # the longest match wins
        self._added_ids = {token.content: index for index, token in added}
        self._special = {token.content for _, token in added if token.special}
        self._word = re.compile(f"[ {_SPACE}]*[^ {_SPACE}]+|[ {_SPACE}]+")
        self._ids = _WordIds(tokenizer.backend_tokenizer)

    def encode(self, rendered: Rendered) -> Pieces | None:
        """Tokenise a chat; special-token text within a content is plain text.

        Returns:
            None if a content begins within a stretch of text instead of at or behind an added token: its first token
            is unknown then.
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
        if not text:
            return []
        words = text.split(" ")  # twice as fast as the pattern, and the same where a single space is between words
        if "" in words or _SPACE in text:
            words = self._word.findall(f" {text}")
        return list(chain.from_iterable(map(self._ids.__getitem__, words)))


class _WordIds(dict[str, list[int]]):
    """The tokens of the words that have been seen, each with the spaces before it, or without a single one."""

    def __init__(self, backend: Tokenizer) -> None:
        super().__init__()
        self._model: Any = backend.model

    def __missing__(self, word: str) -> list[int]:
        spaced = word if word[0] in (" ", _SPACE) else f" {word}"
        ids = [token.id for token in self._model.tokenize(spaced.replace(" ", _SPACE))]
        if len(word) <= _MAX_CHARACTERS:
            if len(self) >= _MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


def words_are_independent(definition: str) -> bool:
    """Whether the tokens of a text are those of its words, by the tokenizer's ``definition`` as in ``tokenizer.json``.

    They are if it merges pairs of a vocabulary in which the space's symbol occurs only at the beginning of tokens,
    normalises nothing else, and falls back to bytes instead of an unknown token.
    """
    tokenizer = json.loads(definition)
    model = tokenizer["model"]
    if model["type"] != "BPE" or tokenizer["normalizer"] != _NORMALIZER or tokenizer["pre_tokenizer"] is not None:
        return False
    no_affixes = not (model["dropout"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"])
    has_bytes = model["byte_fallback"] and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    no_inner_space = all(_SPACE not in token.lstrip(_SPACE) for token in model["vocab"])
    added = tokenizer["added_tokens"]
    literal = not any(token["normalized"] or token["lstrip"] or token["single_word"] for token in added)
    return no_affixes and has_bytes and no_inner_space and literal
