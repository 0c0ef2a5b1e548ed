"""The text of an answer that is still being generated."""

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the first bytes of a character to, until the others arrive."""


class IncrementalDetokenizer:
    """Turns tokens into text as they come, such that no text is ever corrected afterwards.

    All tokens are decoded again with each new one: a token decoded alone loses the space before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self.text = ""
        """Everything that :meth:`add` and :meth:`flush` have returned."""

    def add(self, token: int) -> str:
        """Add a token; return the new text that is final, without incomplete characters or special tokens."""
        self._ids.append(token)
        text = self._decode()
        return "" if text.endswith(INCOMPLETE) else self._advance(text)

    def flush(self) -> str:
        """Return the text that :meth:`add` has held back, at the end of the answer."""
        return self._advance(self._decode())

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _advance(self, text: str) -> str:
        new, self.text = text[len(self.text) :], text
        return new
