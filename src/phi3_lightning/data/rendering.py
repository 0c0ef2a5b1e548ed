"""Chats become text by a tokenizer's chat template, and their contents are found in it."""

from collections.abc import Sequence
from typing import Any, Final, Literal

from transformers import PreTrainedTokenizerFast

from phi3_lightning.data.conversation import BadRowError, Conversation, Message
from phi3_lightning.data.native_tools import TEMPLATE_ERRORS
from phi3_lightning.data.sentinels import (
    Rendered,
    describe_loss,
    insert_sentinels,
    remove_end_sentinels,
    remove_sentinels,
    unused_sentinels,
    without_thoughts,
)

_PLAIN: Final = {"role", "content"}
_Ending = Literal["end", "generation prompt"]


class ChatRenderer:
    """Renders chats, and learns the separators that the template writes between contents: few chats need sentinels."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._separators: dict[tuple[str, str], str] = {}  # between the contents of two roles
        self.end_of_turn = ""
        """The text of the token that ends the assistant's turns, which shows where tool calls end."""

    def render(self, chats: Sequence[Conversation], *, add_generation_prompt: bool) -> list[Rendered | BadRowError]:
        """Return for each chat its text and where its contents are, or why the template cannot render it."""
        ending: _Ending = "generation prompt" if add_generation_prompt else "end"
        plain = [chat.messages for chat in chats if _is_plain(chat)]
        rendered = iter(self._render_plain(plain, ending))
        return [next(rendered) if _is_plain(chat) else self._render_tools(chat, ending) for chat in chats]

    def _render_plain(self, chats: list[list[Message]], ending: _Ending) -> list[Rendered | BadRowError]:
        try:
            texts = self._apply(chats, ending)
        except TEMPLATE_ERRORS:  # of one chat, which must not spoil the others
            texts = [""] * len(chats)
        return [
            self._split_at_separators(chat, text, ending) or self._render_and_learn(chat, ending)
            for chat, text in zip(chats, texts, strict=True)
        ]

    def _apply(self, chats: list[list[Message]], ending: _Ending, tools: object = None) -> list[str]:
        render: Any = self._tokenizer.apply_chat_template  # its annotations know no TypedDict
        prompt = ending == "generation prompt"
        texts: list[str] = render(chats, tools=tools, tokenize=False, add_generation_prompt=prompt)
        return texts

    def _render_and_learn(self, chat: list[Message], ending: _Ending) -> Rendered | BadRowError:
        rendered = self._render_with_sentinels(chat, ending)
        if isinstance(rendered, Rendered) and not rendered.without_thoughts:
            self._learn(chat, rendered, ending)
        return rendered

    def _render_with_sentinels(
        self, chat: list[Message], ending: _Ending, tools: object = None
    ) -> Rendered | BadRowError:
        """Find the contents of a chat; those of messages with tool calls are left alone, and have no range."""
        pair = unused_sentinels(chat)
        contents = [message for message in chat if "tool_calls" not in message]

        def insert(opening: str, closing: str, *, strip: bool) -> list[Message]:
            marked = iter(insert_sentinels(contents, opening, closing, strip=strip))
            return [message if "tool_calls" in message else next(marked) for message in chat]

        try:
            outer, inner = insert(*pair, strip=False), insert(*pair, strip=True)
            plain, *texts = self._apply([chat, outer, inner], ending, tools)
            rendered = next(filter(None, (remove_sentinels(contents, plain, text, *pair) for text in texts)), None)
            if rendered is None and any("</think>" in message["content"] for message in chat):
                _, closing = pair
                outer, inner = insert("", closing, strip=False), insert("", closing, strip=True)
                texts = self._apply([outer, inner], ending, tools)
                rendered = next(
                    filter(None, (remove_end_sentinels(contents, plain, text, closing) for text in texts)), None
                )
        except TEMPLATE_ERRORS as error:
            return BadRowError("the chat template refuses it", str(error))
        return rendered or describe_loss(chat, plain)

    def _render_tools(self, chat: Conversation, ending: _Ending) -> Rendered | BadRowError:
        """Render a chat with tools: an answer with calls goes from where generation begins to its end of turn."""
        rendered = self._render_with_sentinels(chat.messages, ending, chat.tools)
        with_calls = [index for index, message in enumerate(chat.messages) if "tool_calls" in message]
        if isinstance(rendered, BadRowError) or not with_calls:
            return rendered
        answers = {}
        stripped = set()
        for index in with_calls:
            try:
                [before] = self._apply([chat.messages[:index]], "generation prompt", chat.tools)
            except TEMPLATE_ERRORS as error:
                return BadRowError("the chat template refuses it", str(error))
            start, end = len(before), rendered.text.find(self.end_of_turn, len(before))
            if end < 0 or not rendered.text.startswith(before):
                return BadRowError(
                    "tool calls cannot be found",
                    f"messages[{index}] is not rendered between the prompt of generation and {self.end_of_turn!r}; set "
                    "data.tools: render, or give data.chat_template a file with a template that does so",
                )
            message, answer = chat.messages[index], rendered.text[start:end]
            names = [call["function"]["name"] for call in message["tool_calls"]]
            if message["content"].strip() not in answer:
                stripped.add(index)
            if not all(text in answer for text in (without_thoughts(message["content"]).strip(), *names)):
                return BadRowError(
                    "the chat template loses text",
                    f"messages[{index}] has text and tool calls, and not both are rendered",
                )
            answers[index] = (start, end)
        others = [index for index in range(len(chat.messages)) if index not in answers]
        contents = dict(zip(others, rendered.contents, strict=True)) | answers
        return Rendered(
            rendered.text,
            [contents[index] for index in range(len(chat.messages))],
            frozenset(others[position] for position in rendered.without_thoughts) | stripped,
            frozenset(with_calls),
        )

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


def _is_plain(chat: Conversation) -> bool:
    """Whether all that a chat has are roles and contents, which separators can tell apart."""
    return chat.tools is None and all(_PLAIN.issuperset(message) for message in chat.messages)
