"""What the rows of every format become, and the error of a row that cannot be used."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NotRequired, TypedDict

from phi3_lightning.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
"""Who speaks; ``tool`` under ``data.tools: native`` alone."""
Kind = Literal["chat", "pair", "labelled"]
"""What a row is: a chat (also a text or tokens), a chosen and a rejected answer, or an answer with a label."""
KIND_NAMES: Final[dict[Kind, str]] = {
    "chat": "a chat",
    "pair": "a pair of chosen and rejected",
    "labelled": "an answer with a label",
}
"""A row of each kind, in words."""


class Message(TypedDict):
    """One message of a chat, as ``apply_chat_template`` takes it; all but role and content is for native tools."""

    role: Role
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    tools: NotRequired[list[Any] | str]
    """The functions, in the system message of templates that read them there."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of one chat, in order."""

    messages: list[Message]
    trained: list[bool]
    """For each message, whether its content is supervised."""
    tools: list[Any] | str | None = None
    """The functions that may be called, perhaps as JSON, under ``data.tools: native``."""

    @property
    def has_empty_answer(self) -> bool:
        """Whether the content of a trained message is blank, so that its end alone is trained."""
        pairs = zip(self.messages, self.trained, strict=True)
        return any(trained and not message["content"].strip() for message, trained in pairs)


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One prompt with two answers. Only what follows the prompt is supervised."""

    chosen: Conversation
    """The prompt with the better answer."""
    rejected: Conversation
    """The prompt with the worse answer."""

    @property
    def prompt(self) -> Conversation:
        """The messages with which both begin."""
        count = common_length(self.chosen.messages, self.rejected.messages)
        return Conversation(self.chosen.messages[:count], [False] * count, self.chosen.tools)


@dataclass(frozen=True, slots=True)
class LabelledConversation:
    """A prompt with a good or a bad answer, as for KTO. Only the answer is supervised."""

    conversation: Conversation
    preferred: bool
    """Whether the answer is good."""


@dataclass(frozen=True, slots=True)
class PlainText:
    """A text without turns, all of which is trained."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenizedDocument:
    """The tokens of a conversation or a text; of a pair those of the chosen and then of the rejected conversation."""

    input_ids: list[int]
    spans: list[tuple[int, int]]
    """Supervised tokens as half-open ranges, in order: each trained content with its end-of-turn token."""
    chosen_length: int = 0
    """Tokens of the chosen conversation of a pair; 0: not a pair."""
    shared_length: int = 0
    """Leading tokens that both conversations of a pair have in common, as ``Batch`` counts them."""
    preferred: bool | None = None
    """Whether KTO's answer is good; None: the row has no label."""

    @property
    def kind(self) -> Kind:
        """The kind of its row."""
        return "pair" if self.chosen_length else "chat" if self.preferred is None else "labelled"


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


def common_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Return the number of items with which both lists begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(one), len(other)))


def kind_of(value: object) -> str:
    """Name the kind of a JSON value for an error: ``a string``, ``null`` and so on."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
