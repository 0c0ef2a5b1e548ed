"""A row of any known format becomes a conversation, or a named bad row."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal, TypedDict

from phi3_lightning.errors import DataError

Role = Literal["system", "user", "assistant"]
ROLES: Final[dict[str, Role]] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name for the same role
    "user": "user",
    "assistant": "assistant",
}


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


class BadRowError(DataError):
    """A row cannot be used. Whoever reads the file adds file and line.

    Args:
        reason: The kind of fault in a few words; rows are counted by it.
        detail: What was found in this row, and what to do.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def parse_conversation(row: object) -> Conversation:
    """Read a row for training.

    Args:
        row: A decoded row: OpenAI ``messages``, or ``prompt`` and ``completion``.

    Returns:
        A conversation in which users and the assistant take turns and the assistant speaks last.

    Raises:
        BadRowError: The row has no known format, or its turns cannot be trained.
    """
    messages = _messages(row)
    _check_order(messages)
    if messages[-1]["role"] != "assistant":
        raise BadRowError("last turn is not the assistant's", "nothing answers it; remove it or add the answer")
    return Conversation(messages, [message["role"] == "assistant" for message in messages])


def parse_prompt(row: object) -> Conversation:
    """Read a row for generation; an answer at its end is left out.

    Args:
        row: A decoded row: OpenAI ``messages``, or ``prompt`` with or without ``completion``.

    Returns:
        A conversation that ends where the assistant is to speak.

    Raises:
        BadRowError: The row has no known format, or does not lead to an answer.
    """
    messages = _messages(row)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise BadRowError("no question", "a prompt has a user's message before the assistant's turn")
    _check_order(messages)
    return Conversation(messages, [False] * len(messages))


def _messages(row: object) -> list[Message]:
    if not isinstance(row, dict):
        raise BadRowError("not an object", f"a row is a JSON object with named fields, not {_kind(row)}")
    if "messages" in row:
        messages = _message_list(row["messages"], "messages")
    elif "prompt" in row:
        messages = _side(row["prompt"], "prompt", "user")
        if "completion" in row:
            messages += _side(row["completion"], "completion", "assistant")
    else:
        found = ", ".join(map(repr, row)) or "nothing"
        raise BadRowError("unknown format", f"found {found}; known are 'messages', or 'prompt' and 'completion'")
    if not messages:
        raise BadRowError("no messages", "'messages' is empty")
    return messages


def _side(value: object, key: str, role: Role) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": _content(value, key)}]
    return _message_list(value, key)


def _message_list(value: object, key: str) -> list[Message]:
    if not isinstance(value, list):
        raise BadRowError("no list of messages", f"'{key}' is {_kind(value)}; give a list of role and content")
    return [_message(item, f"{key}[{index}]") for index, item in enumerate(value)]


def _message(item: object, where: str) -> Message:
    if not isinstance(item, dict):
        raise BadRowError("not a message", f"{where} is {_kind(item)}; give an object with role and content")
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRowError("unknown role", f"{where}.role is {role!r}; known are {', '.join(ROLES)}")
    if "content" not in item:
        raise BadRowError("no content", f"{where} has no content")
    return {"role": ROLES[role], "content": _content(item["content"], f"{where}.content")}


def _content(value: object, where: str) -> str:
    if isinstance(value, list):
        value = "".join(_text_part(part, f"{where}[{index}]") for index, part in enumerate(value))
    if not isinstance(value, str):
        raise BadRowError("content is not text", f"{where} is {_kind(value)}; give a string or a list of text parts")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRowError("lone surrogate", f"{where} is not valid Unicode at character {error.start}") from None
    return value


def _text_part(part: object, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    found = f"a part of type {part.get('type')!r}" if isinstance(part, dict) else _kind(part)
    raise BadRowError("content is not text", f"{where} is {found}; only {{'type': 'text', 'text': '...'}} is text")


def _check_order(messages: list[Message]) -> None:
    spoken = [index for index, message in enumerate(messages) if message["role"] != "system"]
    if spoken and messages[spoken[0]]["role"] == "assistant":
        raise BadRowError(
            "assistant speaks first", f"messages[{spoken[0]}] answers nothing; put a user's turn before it"
        )
    for before, after in pairwise(spoken):
        role = messages[after]["role"]
        if messages[before]["role"] == role:
            raise BadRowError(
                f"two {role} turns in a row", f"messages[{before}] and messages[{after}]; merge them or remove one"
            )


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
