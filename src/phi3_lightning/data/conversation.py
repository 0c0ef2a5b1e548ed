"""What the rows of every format become, and how a row says that it cannot."""

from dataclasses import dataclass
from typing import Literal, TypedDict

from phi3_lightning.errors import DataError

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One message of a chat, as ``apply_chat_template`` takes it."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is said, in order, and which messages are trained.

    Args:
        messages: The messages of one chat.
        trained: For each message, whether its content is supervised.
    """

    messages: list[Message]
    trained: list[bool]


@dataclass(frozen=True, slots=True)
class PlainText:
    """A text without turns, all of which is trained.

    Args:
        text: The text.
    """

    text: str


@dataclass(frozen=True, slots=True)
class TokenizedDocument:
    """A tokenised document.

    Args:
        input_ids: Its tokens.
        spans: Supervised tokens as half-open ranges, in order: each trained content with its end-of-turn token.
    """

    input_ids: list[int]
    spans: list[tuple[int, int]]


class BadRowError(DataError):
    """A row cannot be used. Whoever reads the file adds file and line.

    Args:
        reason: The kind of fault in a few words; rows are counted by it.
        detail: What was found in this row, and what to do.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadRowError"], tuple[str, str]]:
        return BadRowError, (self.reason, self.detail)  # exceptions are pickled by the arguments of their base


def kind_of(value: object) -> str:
    """Name a JSON value for a message to the user.

    Args:
        value: A decoded value.

    Returns:
        ``a string``, ``null`` and so on.
    """
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
