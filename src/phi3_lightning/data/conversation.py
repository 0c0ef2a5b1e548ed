"""What the rows of every format become, and the error of a row that cannot be used."""

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
    """The messages of one chat, in order."""

    messages: list[Message]
    trained: list[bool]
    """For each message, whether its content is supervised."""


@dataclass(frozen=True, slots=True)
class PlainText:
    """A text without turns, all of which is trained."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenizedDocument:
    """The tokens of a conversation or a text."""

    input_ids: list[int]
    spans: list[tuple[int, int]]
    """Supervised tokens as half-open ranges, in order: each trained content with its end-of-turn token."""


class BadRowError(DataError):
    """A row that cannot be used. The reader of the file adds file and line.

    Args:
        reason: The kind of fault in a few words; rows are counted by it.
        detail: What this row holds, and what to do.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadRowError"], tuple[str, str]]:
        return BadRowError, (self.reason, self.detail)  # by default, with the one argument of super().__init__


def kind_of(value: object) -> str:
    """Name the kind of a JSON value for an error: ``a string``, ``null`` and so on."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
