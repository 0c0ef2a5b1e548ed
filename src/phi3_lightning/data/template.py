"""Conversations become token ids and supervised spans. The only room that knows chat tokens."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

from jinja2 import TemplateError
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from phi3_lightning.data.formats import BadRowError, Conversation, Message
from phi3_lightning.errors import ConfigError

# Unicode sets these aside for a program's own use and text never holds them, so they mark where contents begin and end.
_MARKS: Final = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class Encoded(NamedTuple):
    """A tokenised conversation.

    Args:
        input_ids: The tokenizer's own rendering of the whole conversation.
        spans: Supervised tokens as half-open ranges, in order: each trained content and its end-of-turn token.
    """

    input_ids: list[int]
    spans: list[tuple[int, int]]


class _Rendered(NamedTuple):
    text: str
    contents: list[tuple[int, int]]  # characters of each message's content


class _Pieces:
    """Encodings of a text's pieces, read as one."""

    def __init__(self, starts: list[int], encodings: list[Encoding]) -> None:
        self.ids = [token for encoding in encodings for token in encoding.ids]
        self.offsets = [
            (at + start, at + end)
            for at, encoding in zip(starts[:-1], encodings, strict=True)
            for start, end in encoding.offsets
        ]

    def char_to_token(self, char: int) -> int | None:
        return next((index for index, (start, end) in enumerate(self.offsets) if start <= char < end), None)


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """Load a tokenizer exactly as its ``tokenizer.json`` defines it.

    ``AutoTokenizer`` rebuilds the tokenizer of a folder that names Llama's class, which changes the ids of Phi-3.

    Args:
        name: Folder or hub id.
        revision: Branch, tag or commit on the hub.

    Returns:
        The tokenizer, without truncation and padding of its own.

    Raises:
        ConfigError: There is no such tokenizer, or it has no chat template.
    """
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"data.tokenizer: cannot load {name!r} ({error}). Give a folder with tokenizer.json, or a hub id."
        ) from error
    if tokenizer.chat_template is None:
        raise ConfigError(f"data.tokenizer: {name!r} has no chat template, so chats cannot be rendered.")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


class ChatTemplate:
    """Renders conversations with a tokenizer's own chat template and finds the supervised tokens.

    Args:
        tokenizer: A tokenizer with a chat template.

    Raises:
        ConfigError: The template loses text, doubles the first token, or ends no turn with a token of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._special_ids = {index for index, token in added.items() if token.special}
        specials = sorted((added[index].content for index in self._special_ids), key=len, reverse=True)
        self._special_text = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
        self._end_of_turn = self._check()

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: the template's end of turn, and the tokenizer's end of text."""
        eos = self.tokenizer.eos_token_id
        return [self._end_of_turn] if eos in (None, self._end_of_turn) else [self._end_of_turn, eos]

    def encode(
        self, conversations: Sequence[Conversation], *, add_generation_prompt: bool = False
    ) -> list[Encoded | BadRowError]:
        """Tokenise many conversations at once.

        Args:
            conversations: What is said, and which messages are trained.
            add_generation_prompt: End where the assistant is to speak.

        Returns:
            For each conversation its tokens, or why the template cannot render it.
        """
        rendered = self._render([conversation.messages for conversation in conversations], add_generation_prompt)
        good = [item for item in rendered if isinstance(item, _Rendered)]
        encodings = iter(self._encode_texts([item.text for item in good]))
        return [
            item if isinstance(item, BadRowError) else self._supervise(conversation, item, next(encodings))
            for conversation, item in zip(conversations, rendered, strict=True)
        ]

    def _render(self, chats: list[list[Message]], add_generation_prompt: bool) -> list[_Rendered | BadRowError]:
        def apply(batch: list[list[Message]]) -> list[str]:
            render: Any = self.tokenizer.apply_chat_template  # its annotations know no TypedDict
            texts: list[str] = render(batch, tokenize=False, add_generation_prompt=add_generation_prompt)
            return texts

        def one(chat: list[Message]) -> _Rendered | BadRowError:
            try:
                marks = _free_marks(chat)
                plain, outer, inner = apply([chat, _mark(chat, *marks), _mark(chat, *marks, strip=True)])
                return _unmark(chat, plain, outer, marks) or _unmark(chat, plain, inner, marks) or _lost(chat, plain)
            except (TemplateError, TypeError, ValueError, KeyError) as error:
                return BadRowError("the chat template refuses it", str(error))

        marks = (_MARKS[0], _MARKS[1])
        try:
            plain = apply(chats)
            outer = apply([_mark(chat, *marks) for chat in chats])
        except (TemplateError, TypeError, ValueError, KeyError):
            return [one(chat) for chat in chats]
        rows = zip(chats, plain, outer, strict=True)
        return [_unmark(chat, text, marked, marks) or one(chat) for chat, text, marked in rows]

    def _encode_texts(self, texts: list[str], *, plain: bool = False) -> list[Encoding]:
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = plain
        try:
            return list(backend.encode_batch(texts, add_special_tokens=False))
        finally:
            backend.encode_special_tokens = False

    def _supervise(
        self, chat: Conversation, rendered: _Rendered, encoding: Encoding | _Pieces
    ) -> Encoded | BadRowError:
        if any(self._special_text.search(message["content"]) for message in chat.messages):
            if not self._can_defuse:
                return BadRowError("special-token text", "this tokenizer can only read it as a turn; remove it")
            encoding = self._defuse(rendered, encoding.ids, encoding.offsets)
        spans = []
        for index, (start, end) in enumerate(rendered.contents):
            if not chat.trained[index]:
                continue
            last = encoding.char_to_token(end)
            if last is None or encoding.ids[last] not in self._special_ids:
                return BadRowError("no end of turn", f"messages[{index}]: no special token follows the content")
            first = encoding.char_to_token(start)
            if first is None:
                return BadRowError("the tokenizer loses text", f"messages[{index}] begins with a character it drops")
            before = encoding.offsets[first][0]
            # A role token may swallow the white space that a content begins with; it stays the template's.
            swallowed = before < start and encoding.ids[first] in self._special_ids
            spans.append((first + swallowed, last + 1))
        return Encoded(encoding.ids, spans)

    def _defuse(self, rendered: _Rendered, ids: list[int], offsets: list[tuple[int, int]]) -> _Pieces:
        """Encode again so that only the template's special tokens are special, and a content's are plain text."""
        cuts = [0]
        for token, (start, end) in zip(ids, offsets, strict=True):
            if token in self._special_ids and not any(a <= start < b for a, b in rendered.contents):
                cuts += [start, end]
        cuts.append(len(rendered.text))
        pieces = [rendered.text[start:end] for start, end in pairwise(cuts)]
        encodings: list[Encoding | None] = [None] * len(pieces)
        encodings[0::2] = self._encode_texts(pieces[0::2], plain=True)
        encodings[1::2] = self._encode_texts(pieces[1::2])
        return _Pieces(cuts, [piece for piece in encodings if piece is not None])

    def _check(self) -> int:
        """Try the template on a small chat and return its end-of-turn token."""
        chat: list[Message] = [
            {"role": "user", "content": "first question"},
            {"role": "assistant", "content": "first answer"},
            {"role": "user", "content": "second question"},
            {"role": "assistant", "content": "second answer"},
        ]
        conversation = Conversation(chat, [False, True, False, True])
        [encoded] = self.encode([conversation])
        [rendered] = self._render([chat], add_generation_prompt=False)
        if isinstance(encoded, BadRowError) or isinstance(rendered, BadRowError):
            raise ConfigError(f"data.tokenizer: the chat template cannot be trained with ({encoded}).")
        ids = encoded.input_ids
        [whole] = self._encode_texts([rendered.text])
        # Some tokenizers treat a text's beginning differently: their texts cannot be encoded piece by piece.
        self._can_defuse = self._defuse(rendered, whole.ids, whole.offsets).ids == ids
        if ids[0] == ids[1] == self.tokenizer.bos_token_id:
            raise ConfigError("data.tokenizer: the chat template begins with two bos tokens; remove one from it.")
        ends = {ids[end - 1] for _, end in encoded.spans}
        if len(ends) != 1:
            raise ConfigError("data.tokenizer: the chat template ends the assistant's turns with different tokens.")
        return ends.pop()


def _free_marks(chat: list[Message]) -> tuple[str, str]:
    said = "".join(message["content"] for message in chat)
    free = [mark for mark in _MARKS if mark not in said]
    if len(free) < 2:
        raise ValueError("the contents hold all of Unicode's noncharacters U+FDD0 to U+FDEF")
    return free[0], free[1]


def _mark(chat: list[Message], opening: str, closing: str, *, strip: bool = False) -> list[Message]:
    marked: list[Message] = []
    for message in chat:
        content = message["content"]
        if strip:  # for templates that trim contents: the marks go inside the outer white space
            inner = content.strip()
            head, _, tail = content.partition(inner) if inner else (content, "", "")
            content = f"{head}{opening}{inner}{closing}{tail}"
        else:
            content = f"{opening}{content}{closing}"
        marked.append({"role": message["role"], "content": content})
    return marked


def _unmark(chat: list[Message], plain: str, marked: str, marks: tuple[str, str]) -> _Rendered | None:
    """Take the marks out; None where the template changed, moved or lost a content."""
    opening, closing = marks
    parts = re.split(f"[{opening}{closing}]", marked)
    if len(parts) != 2 * len(chat) + 1 or "".join(parts) != plain:
        return None
    contents = []
    position = 0
    for index, part in enumerate(parts):
        if index % 2:
            if part.strip() != chat[index // 2]["content"].strip():
                return None
            contents.append((position, position + len(part)))
        position += len(part)
    return _Rendered(plain, contents)


def _lost(chat: list[Message], text: str) -> BadRowError:
    for index, message in enumerate(chat):
        if message["content"].strip() not in text:
            return BadRowError(
                "the chat template loses text", f"messages[{index}] of role {message['role']!r} is not rendered"
            )
    return BadRowError("the chat template changes text", "contents are moved or rewritten, so they cannot be trained")
