"""Sentinels, private characters around contents, show where a chat template puts them.

A template may leave thoughts, ``<think>...</think>``, out of earlier answers, as those of reasoning models do.
Sentinels behind contents still show where these end.
"""

import json
import re
from itertools import islice
from typing import Final, NamedTuple

from phi3_lightning.data.conversation import BadRowError, Message

# After <think>, or at the beginning of a content, since some templates write <think> in the generation prompt.
_THOUGHTS: Final = re.compile(r"(?:\A|<think>)(?:(?!<think>).)*?</think>", re.DOTALL)
# Unicode reserves the first 32 for a program's own use, so text hardly ever holds them; private-use ones come next.
_SENTINELS: Final = [*map(chr, range(0xFDD0, 0xFDF0)), *map(chr, range(0xE000, 0xF900))]


class Rendered(NamedTuple):
    """A chat as the template writes it."""

    text: str
    contents: list[tuple[int, int]]
    """Where in the text each message's content is, as half-open ranges of characters."""
    without_thoughts: frozenset[int] = frozenset()
    """The messages whose range holds the content except its thoughts, which are left out or rewritten."""
    with_calls: frozenset[int] = frozenset()
    """The messages whose range holds all that the assistant says, tool calls and the template's tokens in them."""


def without_thoughts(content: str) -> str:
    """Return a content without ``<think>...</think>``."""
    return _THOUGHTS.sub("", content)


def unused_sentinels(chat: list[Message]) -> tuple[str, str]:
    """Return an opening and a closing sentinel that a chat does not hold."""
    text = "".join(
        message["content"] + json.dumps(message.get("tool_calls", ""), ensure_ascii=False) for message in chat
    )
    opening, closing = islice((sentinel for sentinel in _SENTINELS if sentinel not in text), 2)
    return opening, closing


def insert_sentinels(chat: list[Message], opening: str, closing: str, *, strip: bool = False) -> list[Message]:
    """Put sentinels around each content; ``strip`` leaves outer white space outside, for templates that trim it."""
    result: list[Message] = []
    for message in chat:
        content = message["content"]
        inner = content.strip() if strip else content
        head, _, tail = content.partition(inner) if inner else (content, "", "")
        result.append({**message, "content": f"{head}{opening}{inner}{closing}{tail}"})
    return result


def remove_sentinels(
    chat: list[Message], plain: str, with_sentinels: str, opening: str, closing: str
) -> Rendered | None:
    """Find the contents of a chat in its ``plain`` text, by its text ``with_sentinels``.

    Returns:
        None if the template changed, moved or lost a content.
    """
    parts = re.split(f"[{opening}{closing}]", with_sentinels)
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
    return Rendered(plain, contents)


def remove_end_sentinels(chat: list[Message], plain: str, with_sentinels: str, closing: str) -> Rendered | None:
    """Find contents by the sentinels behind them; None if the template changed, moved or lost more than thoughts."""
    parts = with_sentinels.split(closing)
    if len(parts) != len(chat) + 1 or "".join(parts) != plain:
        return None
    contents = []
    stripped = set()
    position = 0
    for index, (message, part) in enumerate(zip(chat, parts, strict=False)):
        position += len(part)
        content = message["content"]
        answer = without_thoughts(content)
        # as it is, or without outer white space, which a template trims or which is outside of the sentinels
        endings = (content, content.lstrip(), content.rstrip(), content.strip(), answer, answer.strip())
        ending = next((ending for ending in endings if part.endswith(ending)), None)
        if ending is None:
            return None
        if ending.strip() != content.strip():
            stripped.add(index)
        contents.append((position - len(ending), position))
    return Rendered(plain, contents, frozenset(stripped))


def describe_loss(chat: list[Message], text: str) -> BadRowError:
    """Return the error of a chat whose contents cannot be found in the text that the template makes of it."""
    for index, message in enumerate(chat):
        if message["content"].strip() not in text:
            fault = f"messages[{index}] of role {message['role']!r} is not rendered"
            remedy = "; data.system: merge_into_user puts it before the first question" * (message["role"] == "system")
            return BadRowError("the chat template loses text", fault + remedy)
    return BadRowError("the chat template changes text", "contents are moved or rewritten, so they cannot be trained")
