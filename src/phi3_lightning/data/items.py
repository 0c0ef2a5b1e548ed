"""The messages of a row of any chat format, in OpenAI's shape, each with its place in the row."""

from collections.abc import Mapping
from typing import Any

from phi3_lightning.config.data import FORMATS, SYSTEM, TOOLS, RowOptions
from phi3_lightning.data.conversation import BadRowError, kind_of
from phi3_lightning.data.fields import is_absent, read_alias, read_list
from phi3_lightning.data.message_fields import ROLES, read_message, role_of
from phi3_lightning.data.messages import Turn, check_text, read_messages

Items = list[tuple[str, dict[str, Any]]]


def read_chat(fields: Mapping[str, Any], name: str, options: RowOptions, unread: set[str]) -> list[Turn]:
    """Return the turns of a row.

    Args:
        name: One of the formats of chats.
        unread: Receives the names of fields of messages that nothing reads.

    Raises:
        BadRowError: If a message is invalid.
    """
    answers = {"alpaca": "output", "prompt_completion": "completion"}
    items = read_prompt(fields, name, options, unread)
    if name in answers and fields.get(answers[name]) is not None:
        items += read_items(fields[answers[name]], answers[name], "assistant", options, unread)
    return read_turns(fields, items, options)


def read_prompt(fields: Mapping[str, Any], name: str, options: RowOptions, unread: set[str]) -> Items:
    """Return the messages before the answer of a row; all of them if its format has no field for the answer."""
    if name == "alpaca":
        return _alpaca(fields)
    if name == "prompt_completion":
        return read_items(fields["prompt"], "prompt", "user", options, unread)
    [key] = FORMATS[name]
    return read_message_list(fields[key], key, options, unread)


def read_turns(fields: Mapping[str, Any], items: Items, options: RowOptions) -> list[Turn]:
    """Return messages of a row as turns, with its system message and its tools."""
    return read_messages(_with_system(fields, items, options), read_alias(fields, TOOLS), options)


def read_items(value: object, key: str, role: str, options: RowOptions, unread: set[str]) -> Items:
    """Return the messages of a list, or a text as a message of a role."""
    if isinstance(value, list):
        return read_message_list(value, key, options, unread)
    return [(key, {"role": role, "content": read_string(value, key)})]


def read_message_list(value: object, key: str, options: RowOptions, unread: set[str]) -> Items:
    """Return the messages of a list, which CSV holds as JSON."""
    places = ((f"{key}[{index}]", item) for index, item in enumerate(read_list(value, key)))
    return [(where, read_message(item, where, options, unread)) for where, item in places]


def read_string(value: object, key: str) -> str:
    """Return a text, with line feeds as line ends.

    Raises:
        BadRowError: If it is not a text.
    """
    if not isinstance(value, str):
        raise BadRowError("content is not text", f"'{key}' is {kind_of(value)}; give a string")
    return check_text(value, key)


def _alpaca(fields: Mapping[str, Any]) -> Items:
    items: Items = []
    for index, pair in enumerate(read_list(fields.get("history") or [], "history")):
        where = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRowError("not a message", f"{where} is not a pair of question and answer")
        question, answer = pair
        items += [(where, {"role": "user", "content": question}), (where, {"role": "assistant", "content": answer})]
    keys = [key for key in ("instruction", "input") if not is_absent(fields.get(key))] or ["instruction"]
    instruction = "\n\n".join(read_string(fields[key], key) for key in keys)
    return [*items, ("instruction", {"role": "user", "content": instruction})]


def _with_system(fields: Mapping[str, Any], items: Items, options: RowOptions) -> Items:
    system = read_alias(fields, SYSTEM)
    if system is None:
        return items
    own = [(where, item.get("content")) for where, item in items if _is_system(item, options)]
    if own and [content for _, content in own] != [system]:
        raise BadRowError("two system messages", f"the row's 'system' and {own[0][0]} differ; keep one of them")
    return items if own else [("system", {"role": "system", "content": system}), *items]


def _is_system(item: dict[str, Any], options: RowOptions) -> bool:
    role = role_of(item, options)
    return isinstance(role, str) and ROLES.get(role) == "system"
