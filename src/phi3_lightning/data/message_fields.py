"""The fields of one message under OpenAI's names, whatever tool wrote it.

==================================  ================================================================================
in the message                      read as
==================================  ================================================================================
``from``, ``value``                 ``role``, ``content``, and ShareGPT's speakers as roles
``data.message_keys``               what it says
``reasoning``, ``thinking``         ``reasoning_content``
a flag, such as ``loss: false``     whether the message is trained, see ``FLAGS``
anything else                       counted as ``messages[].name``
==================================  ================================================================================
"""

import json
from typing import Any, Final

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.conversation import BadRowError, Role, kind_of
from phi3_lightning.data.fields import is_absent, only, rename

ROLES: Final[dict[str, Role]] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name for the same role
    "user": "user",
    "assistant": "assistant",
    "tool": "user",  # a model that knows no tool role hears the result from the user
    "function": "user",  # OpenAI's older name for tool
}
SPEAKERS: Final = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("observation", "observations", "function_response", "tool_response"), "tool"),
}
"""What ShareGPT's sets call the roles, as FastChat, LLaMA-Factory and ms-swift read them."""

REASONING: Final = ("reasoning_content", "reasoning", "thinking")
CALLS: Final = ("tool_calls", "function_call")
FLAGS: Final = (
    "train",  # the usual choice for Axolotl's message_field_training
    "training",
    "trainable",  # verl, Tinker
    "loss",  # ms-swift
    "loss_mask",
    "step_loss_mask",  # slime
    "loss_weight",  # LLaMA-Factory
    "weight",  # OpenAI, Mistral, Together
)
"""The names under which tools say whether a message is trained; true and 1, or false and 0."""

_PARTS: Final = ("train_detail", "training_detail")  # Axolotl: ranges of characters
PARTS: Final = {"text": "text", "reasoning": "reasoning", "thinking": "reasoning", "tool_call": "call"}
"""The types of a content's parts, and what they are: text, reasoning or a call."""

_PART_KEYS: Final = frozenset(("type", "value", *PARTS))
_CALL_KEYS: Final = frozenset(("type", "function", "name", "arguments", "parameters"))
_MARKS: Final = frozenset((*FLAGS, *_PARTS))
_KNOWN: Final = _MARKS | {"role", "content", *REASONING, *CALLS}


def read_message(item: object, where: str, options: RowOptions, unused: set[str]) -> dict[str, Any]:
    """Give a message's fields the names that are read here.

    Args:
        item: The message, as the file has it.
        where: Its place in the row.
        options: Other names for keys and roles.
        unused: Takes the names of fields that nothing reads.

    Returns:
        Its fields: ``role``, ``content`` and so on.

    Raises:
        BadRowError: It is no message, or lacks a key that ``data.message_keys`` names.
    """
    if not isinstance(item, dict):
        raise BadRowError("not a message", f"{where} is {kind_of(item)}; give an object with role and content")
    from_value = "from" in item or "value" in item
    displaced: list[str] = []
    if options.message_keys is not None:
        _check_keys(item, where, options.message_keys)
        item, displaced = rename(item, options.message_keys)
    if from_value:
        item = _from_value(item, where, options)
    if displaced or not _KNOWN.issuperset(item):
        unused.update(f"{_list_of(where)}[].{key}" for key in displaced + _others(item, _KNOWN))
    if "tool_calls" in item or not isinstance(item.get("content"), str):
        for field, keys in (("content", _PART_KEYS), ("tool_calls", _CALL_KEYS)):
            inner = item.get(field)
            parts = inner if isinstance(inner, list) else []
            names = {key for part in parts if isinstance(part, dict) for key in _others(part, keys)}
            unused.update(f"{_list_of(where)}[].{field}[].{key}" for key in names)
    return item


def _others(fields: dict[str, Any], known: frozenset[str]) -> list[str]:
    return [key for key, value in fields.items() if key not in known and not is_absent(value)]


def _list_of(where: str) -> str:
    return where.partition("[")[0]


def role_of(message: dict[str, Any], options: RowOptions) -> object:
    """Say who speaks.

    Args:
        message: A message, after ``read_message``.
        options: Other names for roles.

    Returns:
        A key of ``ROLES``, or what the message has instead.
    """
    role = message.get("role")
    return (options.role_map or {}).get(role, role) if isinstance(role, str) else role


def is_trained(message: dict[str, Any], where: str) -> bool | None:
    """Read whether a message says that it is trained.

    Args:
        message: A message, after ``read_message``.
        where: Its place in the row.

    Returns:
        What it says; None where it says nothing.

    Raises:
        BadRowError: It says something else than yes or no, or both, or speaks of a part of the message.
    """
    if _MARKS.isdisjoint(message):
        return None
    for key in _PARTS:
        if not is_absent(message.get(key)):
            raise BadRowError(
                "a part of a message is marked",
                f"{where}.{key}: a message is trained as a whole; divide it, mark it with 'train', or give the row as "
                "input_ids and labels",
            )
    flags = {key: message[key] for key in FLAGS if not is_absent(message.get(key))}
    for key, value in flags.items():
        if value not in (0, 1):  # also true and false
            raise BadRowError(f"{key} is not 0 or 1", f"{where} has {key} {value!r}; a message is trained or not")
    if len(set(flags.values())) > 1:
        said = ", ".join(f"{key} {value!r}" for key, value in flags.items())
        raise BadRowError("flags contradict each other", f"{where} has {said}; keep one of them")
    return bool(next(iter(flags.values()))) if flags else None


def _check_keys(item: dict[str, Any], where: str, keys: dict[str, str]) -> None:
    for name in ("role", "content"):
        key = keys.get(name, name)
        if (
            name in keys
            and key not in item
            and not (name == "content" and keys.get("tool_calls", "tool_calls") in item)
        ):
            found = ", ".join(map(repr, item)) or "nothing"
            raise BadRowError("key is missing", f"data.message_keys names {key!r} for '{name}'; {where} has {found}")


def _from_value(item: dict[str, Any], where: str, options: RowOptions) -> dict[str, Any]:
    """ShareGPT's turn, or one that has only one of its keys."""
    message = {key: value for key, value in item.items() if key != "value"}
    content = only(item, ("content", "value"), where)
    if content is not None or "content" not in item:
        message["content"] = item["value"] if content is None and "value" in item else content
    if is_absent(item.get("role")):
        message["role"] = message.pop("from", None)
    speaker = message["role"]
    if isinstance(speaker, str) and speaker not in (options.role_map or {}):
        message["role"] = SPEAKERS.get(speaker, speaker)
    if speaker in ("function_call", "tool_call") and is_absent(item.get("tool_calls")):
        message |= {"content": "", "tool_calls": _calls(content, where)}
    return message


def _calls(value: object, where: str) -> list[object]:
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise BadRowError("not JSON", f"{where} is a function_call, and its text is no JSON ({error})") from None
    return calls if isinstance(calls, list) else [calls]
