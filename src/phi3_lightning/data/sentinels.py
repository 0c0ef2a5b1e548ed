"""Private characters around contents show where a chat template puts them.

A template may leave thoughts, ``<think>...</think>``, out of earlier answers, as those of reasoning models do. Marks
behind contents still show where these end.
"""

import re
from itertools import islice
from typing import Final, NamedTuple

from phi3_lightning.data.conversation import BadRowError, Message

# opened, or at the beginning of a content, since some templates open it in the generation prompt
_THOUGHTS: Final = re.compile(r"(?:\A|<think>)(?:(?!<think>).)*?</think>", re.DOTALL)
# Unicode sets the first 32 aside for a program's own use, so text never holds them; should it, private ones are left.
_MARKS: Final = [*map(chr, range(0xFDD0, 0xFDF0)), *map(chr, range(0xE000, 0xF900))]


class Rendered(NamedTuple):
    """A chat as the template writes it.

    Args:
        text: The whole.
        contents: Where in it each message's content is, as half-open ranges of characters.
        thoughtless: The messages of whose contents this is all but the thoughts, which are left out or written anew.
    """

    text: str
    contents: list[tuple[int, int]]
    thoughtless: frozenset[int] = frozenset()


def unused_sentinels(chat: list[Message]) -> tuple[str, str]:
    """Find two marks that a chat does not hold.

    Args:
        chat: The messages.

    Returns:
        An opening and a closing mark.
    """
    said = "".join(message["content"] for message in chat)
    opening, closing = islice((mark for mark in _MARKS if mark not in said), 2)
    return opening, closing


def insert_sentinels(chat: list[Message], opening: str, closing: str, *, strip: bool = False) -> list[Message]:
    """Put marks around each content.

    Args:
        chat: The messages.
        opening: The mark before a content.
        closing: The mark behind it.
        strip: Leave outer white space outside of the marks, for templates that trim contents.

    Returns:
        The marked messages.
    """
    marked: list[Message] = []
    for message in chat:
        content = message["content"]
        if strip:
            inner = content.strip()
            head, _, tail = content.partition(inner) if inner else (content, "", "")
            content = f"{head}{opening}{inner}{closing}{tail}"
        else:
            content = f"{opening}{content}{closing}"
        marked.append({"role": message["role"], "content": content})
    return marked


def remove_sentinels(chat: list[Message], plain: str, marked: str, marks: tuple[str, str]) -> Rendered | None:
    """Take the marks out again.

    Args:
        chat: The messages as they were.
        plain: What the template makes of them.
        marked: What it makes of the marked ones.
        marks: The opening and the closing mark.

    Returns:
        The text and its contents; None where the template changed, moved or lost a content.
    """
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
    return Rendered(plain, contents)


def remove_end_sentinels(chat: list[Message], plain: str, marked: str, closing: str) -> Rendered | None:
    """Take marks out again that were only put behind contents.

    Args:
        chat: The messages as they were.
        plain: What the template makes of them.
        marked: What it makes of the marked ones.
        closing: The mark.

    Returns:
        The text and its contents; None where the template changed, moved or lost more than thoughts.
    """
    parts = marked.split(closing)
    if len(parts) != len(chat) + 1 or "".join(parts) != plain:
        return None
    contents = []
    thoughtless = set()
    position = 0
    for index, (message, part) in enumerate(zip(chat, parts, strict=False)):
        position += len(part)
        content = message["content"]
        answer = _THOUGHTS.sub("", content)
        # as it is, or without the outer white space that a template trims, or that the mark was put before
        endings = (content, content.lstrip(), content.rstrip(), content.strip(), answer, answer.strip())
        ending = next((ending for ending in endings if part.endswith(ending)), None)
        if ending is None:
            return None
        if ending.strip() != content.strip():
            thoughtless.add(index)
        contents.append((position - len(ending), position))
    return Rendered(plain, contents, frozenset(thoughtless))


def has_thoughts(chat: list[Message]) -> bool:
    """Whether an assistant of a chat thinks aloud.

    Args:
        chat: The messages.

    Returns:
        True where a content has the end of a ``<think>`` block.
    """
    return any("</think>" in message["content"] for message in chat)


def lost(chat: list[Message], text: str) -> BadRowError:
    """Say what a template did to contents that were not found again.

    Args:
        chat: The messages.
        text: What the template makes of them.

    Returns:
        The fault.
    """
    for index, message in enumerate(chat):
        if message["content"].strip() not in text:
            return BadRowError(
                "the chat template loses text", f"messages[{index}] of role {message['role']!r} is not rendered"
            )
    return BadRowError("the chat template changes text", "contents are moved or rewritten, so they cannot be trained")
