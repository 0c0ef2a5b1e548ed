"""Chats become text by a tokenizer's chat template, and their contents are found in it."""

from typing import Any, Final, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from phi3_lightning.data.conversation import BadRowError, Message
from phi3_lightning.data.sentinels import (
    Rendered,
    describe_loss,
    insert_sentinels,
    remove_end_sentinels,
    remove_sentinels,
    unused_sentinels,
)

_TEMPLATE_ERRORS: Final = (TemplateError, TypeError, ValueError, KeyError)
_Ending = Literal["end", "generation prompt"]


class ChatRenderer:
    """Renders chats, and learns the separators that the template writes between contents: few chats need sentinels."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._separators: dict[tuple[str, str], str] = {}  # between the contents of two roles

    def render(self, chats: list[list[Message]], *, add_generation_prompt: bool) -> list[Rendered | BadRowError]:
        """Return for each chat its text and where its contents are, or why the template cannot render it."""
        ending: _Ending = "generation prompt" if add_generation_prompt else "end"
        try:
            texts = self._apply(chats, ending)
        except _TEMPLATE_ERRORS:  # of one chat, which must not spoil the others
            return [self._render_with_sentinels(chat, ending) for chat in chats]
        return [
            self._split_at_separators(chat, text, ending) or self._render_with_sentinels(chat, ending)
            for chat, text in zip(chats, texts, strict=True)
        ]

    def _apply(self, chats: list[list[Message]], ending: _Ending) -> list[str]:
        render: Any = self._tokenizer.apply_chat_template  # its annotations know no TypedDict
        texts: list[str] = render(chats, tokenize=False, add_generation_prompt=ending == "generation prompt")
        return texts

    def _render_with_sentinels(self, chat: list[Message], ending: _Ending) -> Rendered | BadRowError:
        try:
            pair = unused_sentinels(chat)
            outer, inner = insert_sentinels(chat, *pair), insert_sentinels(chat, *pair, strip=True)
            plain, *texts = self._apply([chat, outer, inner], ending)
            rendered = next(filter(None, (remove_sentinels(chat, plain, text, *pair) for text in texts)), None)
            if rendered:
                self._learn(chat, rendered, ending)
                return rendered
            if any("</think>" in message["content"] for message in chat):
                _, closing = pair
                outer, inner = insert_sentinels(chat, "", closing), insert_sentinels(chat, "", closing, strip=True)
                texts = self._apply([outer, inner], ending)
                rendered = next(
                    filter(None, (remove_end_sentinels(chat, plain, text, closing) for text in texts)), None
                )
        except _TEMPLATE_ERRORS as error:
            return BadRowError("the chat template refuses it", str(error))
        return rendered or describe_loss(chat, plain)

    def _learn(self, chat: list[Message], rendered: Rendered, ending: _Ending) -> None:
        position = 0
        before = "start"
        for message, (start, end) in zip(chat, rendered.contents, strict=True):
            self._separators.setdefault((before, message["role"]), rendered.text[position:start])
            position, before = end, message["role"]
        self._separators.setdefault((before, ending), rendered.text[position:])

    def _split_at_separators(self, chat: list[Message], text: str, ending: _Ending) -> Rendered | None:
        """Find contents between known separators; None unless both together are the whole text."""
        parts: list[str] = []
        contents = []
        position = 0
        before = "start"
        for message in chat:
            separator = self._separators.get((before, message["role"]))
            if separator is None:
                return None
            before, content = message["role"], message["content"]
            start = position + len(separator)
            position = start + len(content)
            contents.append((start, position))
            parts += (separator, content)
        parts.append(self._separators.get((before, ending), ""))
        return Rendered(text, contents) if "".join(parts) == text else None
