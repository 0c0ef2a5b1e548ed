"""The text of special tokens within contents stays plain text: such a chat is encoded in pieces."""

from collections.abc import Callable
from itertools import pairwise

from tokenizers import Encoding

from phi3_lightning.data.sentinels import Rendered


class JoinedEncoding:
    """The encodings of the pieces of a text, read as one.

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
        """Return the token that holds a character; None if no token does."""
        return next((index for index, (start, end) in enumerate(self.offsets) if start <= char < end), None)

    def token_to_chars(self, token: int) -> tuple[int, int]:
        """Return the characters of a token."""
        return self.offsets[token]


def encode_contents_as_text(
    rendered: Rendered, whole: Encoding, special_ids: set[int], encode: Callable[..., list[Encoding]]
) -> JoinedEncoding:
    """Encode a chat again such that only the template's special tokens are special.

    Args:
        whole: The encoding of the chat, in which the special text of contents has become special tokens too.
        encode: Encodes texts; with ``plain`` special text becomes ordinary tokens.
    """
    contents = [place for index, place in enumerate(rendered.contents) if index not in rendered.with_calls]
    cuts = [0]
    for token, (start, end) in zip(whole.ids, whole.offsets, strict=True):
        if token in special_ids and not any(a <= start < b for a, b in contents):
            cuts += [start, end]
    cuts.append(len(rendered.text))
    pieces = [rendered.text[start:end] for start, end in pairwise(cuts)]  # ordinary and special text alternate
    encodings: list[Encoding | None] = [None] * len(pieces)
    encodings[0::2] = encode(pieces[0::2], plain=True)
    encodings[1::2] = encode(pieces[1::2])
    return JoinedEncoding(cuts, [encoding for encoding in encodings if encoding is not None])
