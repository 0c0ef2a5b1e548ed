"""The text of special tokens within contents stays plain text: a chat is encoded in pieces."""

from collections.abc import Callable
from itertools import pairwise

from tokenizers import Encoding

from phi3_lightning.data.sentinels import Rendered


class Joined:
    """Encodings of a text's pieces, read as one.

    Args:
        starts: Where in the text each piece begins, and where the last one ends.
        encodings: The pieces.
    """

    def __init__(self, starts: list[int], encodings: list[Encoding]) -> None:
        self.ids = [token for encoding in encodings for token in encoding.ids]
        self.offsets = [
            (at + start, at + end)
            for at, encoding in zip(starts[:-1], encodings, strict=True)
            for start, end in encoding.offsets
        ]

    def char_to_token(self, char: int) -> int | None:
        """Return the token that holds a character; None where none does."""
        return next((index for index, (start, end) in enumerate(self.offsets) if start <= char < end), None)

    def token_to_chars(self, token: int) -> tuple[int, int]:
        """Return the characters of a token."""
        return self.offsets[token]


def encode_apart(
    rendered: Rendered, whole: Encoding, special_ids: set[int], encode: Callable[..., list[Encoding]]
) -> Joined:
    """Encode again so that only the template's special tokens are special, and a content's are plain text.

    Args:
        rendered: A chat.
        whole: Its tokens, of which all special tokens' texts have become special ones.
        special_ids: The special tokens.
        encode: Encodes texts; with ``plain`` special tokens' texts too are plain.

    Returns:
        The tokens.
    """
    cuts = [0]
    for token, (start, end) in zip(whole.ids, whole.offsets, strict=True):
        if token in special_ids and not any(a <= start < b for a, b in rendered.contents):
            cuts += [start, end]
    cuts.append(len(rendered.text))
    pieces = [rendered.text[start:end] for start, end in pairwise(cuts)]
    encodings: list[Encoding | None] = [None] * len(pieces)
    encodings[0::2] = encode(pieces[0::2], plain=True)
    encodings[1::2] = encode(pieces[1::2])
    return Joined(cuts, [piece for piece in encodings if piece is not None])
