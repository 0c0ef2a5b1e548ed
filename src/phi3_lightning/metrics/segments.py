"""Words of texts in any script, for scores whose own tokenizers know only Latin text."""

import unicodedata

import regex

UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Line_Break=Complex_Context}\u30fc]"
"""Scripts without spaces between words: Chinese, Japanese, and Thai, Lao, Khmer, Burmese and their relatives."""

SIGNS = r"[\u3000-\u303f\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef\u0f0b-\u0f11\u1361-\u1368]"
"""Punctuation that separates words without spaces: of Chinese and Japanese, Tibetan and Ethiopic."""

_WORD = regex.compile(rf"{UNSPACED}\p{{M}}*|[[\p{{L}}\p{{M}}\p{{Nd}}\p{{Nl}}]--{UNSPACED}]+", regex.VERSION1)
_WIDE = regex.compile(r"[\uff00-\uffef]+")
_INVISIBLE = regex.compile(r"\p{Cf}+")
_SEPARATED = regex.compile(rf"({UNSPACED}\p{{M}}*|{SIGNS})", regex.VERSION1)


class WordTokenizer:
    """Splits text for ROUGE; English text as ``rouge_score`` splits it.

    Words are runs of letters, marks and digits of any script, in lower case and one normal form (NFC; full-width and
    half-width forms become the usual ones). In scripts without spaces each character is a word, with its marks.
    """

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        normal = _WIDE.sub(lambda match: unicodedata.normalize("NFKC", match[0]), unicodedata.normalize("NFC", text))
        words: list[str] = _WORD.findall(_INVISIBLE.sub("", normal.lower()))
        return words


def spaced(text: str) -> str:
    """Put spaces around each character of scripts without spaces; other text is returned unchanged."""
    separated: str = _SEPARATED.sub(r" \1 ", text)
    return separated
