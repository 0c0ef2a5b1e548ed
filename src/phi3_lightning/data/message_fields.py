"""The fields of one message under OpenAI's names, whatever tool wrote it.

==================================  ================================================================================
in the message                      read as
==================================  ================================================================================
``from``, ``value``                 ``role``, ``content``, and ShareGPT's speakers as roles
``data.message_keys``               the names that it maps them to
``reasoning``, ``thinking``         ``reasoning_content``
a flag, such as ``loss: false``     whether the message is trained, see ``FLAGS``
``tools`` of a system message       the functions of the row
``tool_call_id``, ``name``          of a tool's result, for the chat template under ``data.tools: native``
anything else                       counted as ``messages[].name``
==================================  ================================================================================
"""

import json
from typing import Any, Final

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.conversation import BadRowError, Role, kind_of
from phi3_lightning.data.fields import is_absent, read_alias, rename

ROLES: Final[dict[str, Role]] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name for the same role
    "user": "user",
    "assistant": "assistant",
    "tool": "user",  # the chat template has no tool role: the user reports the result
    "function": "user",  # OpenAI's older name for tool
}
SPEAKERS: Final = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("observation", "observations", "function_response", "tool_response"), "tool"),
}
"""ShareGPT's names of the roles, as FastChat, LLaMA-Factory and ms-swift read them."""

TOOL_ROLES: Final = frozenset(("tool", "function"))
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
"""The keys with which other tools mark whether a message is trained: true or 1, false or 0."""

CONTENT_PARTS: Final = {"text": "text", "reasoning": "reasoning", "thinking": "reasoning", "tool_call": "call"}
"""The types that the parts of a content may have, each with its kind: text, reasoning or call."""

_PARTIAL_FLAGS: Final = ("train_detail", "training_detail")  # Axolotl: ranges of characters
_ALL_FLAGS: Final = frozenset((*FLAGS, *_PARTIAL_FLAGS))
_NATIVE_KEYS: Final = frozenset(("tool_call_id", "name"))
_MESSAGE_KEYS: Final = _ALL_FLAGS | {"role", "content", *REASONING, *CALLS}
_PART_KEYS: Final = frozenset(("type", "value", *CONTENT_PARTS))
_CALL_KEYS: Final = frozenset(("type", "function", "name", "arguments", "parameters"))


def read_message(item: object, where: str, options: RowOptions, unused: set[str]) -> dict[str, Any]:
    """Return the fields of a message under OpenAI's names; ``unused`` receives the names of those that nothing reads.

    Raises:
        BadRowError: If it is not a message, or lacks a key that ``data.message_keys`` names.
    """
    if not isinstance(item, dict):
        raise BadRowError("not a message", f"{where} is {kind_of(item)}; give an object with role and content")
    is_sharegpt = "from" in item or "value" in item
    displaced: list[str] = []
    if options.message_keys is not None:
        _check_keys(item, where, options.message_keys)
        item, displaced = rename(item, options.message_keys)
    if is_sharegpt:
        item = _from_sharegpt(item, where, options)
    field = where.partition("[")[0]  # of the row, such as messages
    if displaced or not _MESSAGE_KEYS.issuperset(item):
        unused.update(f"{field}[].{key}" for key in displaced + _other_keys(item, _keys_of(item, options)))
    if "tool_calls" in item or not isinstance(item.get("content"), str):
        call_keys = _CALL_KEYS | {"id"} if options.tools == "native" else _CALL_KEYS
        for name, keys in (("content", _PART_KEYS), ("tool_calls", call_keys)):
            parts = item[name] if isinstance(item.get(name), list) else []
            others = {key for part in parts if isinstance(part, dict) for key in _other_keys(part, keys)}
            unused.update(f"{field}[].{name}[].{key}" for key in others)
    return item


def _keys_of(message: dict[str, Any], options: RowOptions) -> frozenset[str]:
    """The keys that are read of a message."""
    role = role_of(message, options)
    if role in ("system", "developer"):
        return _MESSAGE_KEYS | {"tools"}
    return _MESSAGE_KEYS | _NATIVE_KEYS if role in TOOL_ROLES and options.tools == "native" else _MESSAGE_KEYS


def _other_keys(fields: dict[str, Any], known: frozenset[str]) -> list[str]:
    return [key for key, value in fields.items() if key not in known and not is_absent(value)]


def role_of(message: dict[str, Any], options: RowOptions) -> object:
    """Return the role of a message, after ``data.role_map``: a key of ``ROLES``, or an unknown value."""
    role = message.get("role")
    return (options.role_map or {}).get(role, role) if isinstance(role, str) else role


def is_trained(message: dict[str, Any], where: str) -> bool | None:
    """Return whether a message is trained by its own flags; None if it has no flag.

    Raises:
        BadRowError: If a flag is neither true nor false, or flags differ, or one is for a part of the message.
    """
    if _ALL_FLAGS.isdisjoint(message):
        return None
    for key in _PARTIAL_FLAGS:
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
        listing = ", ".join(f"{key} {value!r}" for key, value in flags.items())
        raise BadRowError("flags contradict each other", f"{where} has {listing}; keep one of them")
    return bool(next(iter(flags.values()))) if flags else None


def _check_keys(item: dict[str, Any], where: str, keys: dict[str, str]) -> None:
    has_calls = keys.get("tool_calls", "tool_calls") in item  # which need no content
    for name in ("role", "content"):
        if name in keys and keys[name] not in item and not (name == "content" and has_calls):
            names = ", ".join(map(repr, item)) or "nothing"
            fault = f"data.message_keys names {keys[name]!r} for '{name}'; {where} has {names}"
            raise BadRowError("key is missing", fault)


def _from_sharegpt(item: dict[str, Any], where: str, options: RowOptions) -> dict[str, Any]:
    """A message that has ``from`` or ``value``, or both."""
    message = {key: value for key, value in item.items() if key != "value"}
    content = read_alias(item, ("content", "value"), where)
    if content is not None or "content" not in item:
        message["content"] = item["value"] if content is None and "value" in item else content
    if is_absent(item.get("role")):
        message["role"] = message.pop("from", None)
    speaker = message["role"]
    if isinstance(speaker, str) and speaker not in (options.role_map or {}):
        message["role"] = SPEAKERS.get(speaker, speaker)
    if speaker in ("function_call", "tool_call") and is_absent(item.get("tool_calls")):
        message |= {"content": "", "tool_calls": _parse_calls(content, where)}
    return message


def _parse_calls(value: object, where: str) -> list[object]:
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise BadRowError("not JSON", f"{where} is a function_call, and its text is not JSON ({error})") from None
    return calls if isinstance(calls, list) else [calls]
