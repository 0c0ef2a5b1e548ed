"""Messages in OpenAI's shape become plain turns; tool calls and reasoning become text by one convention.

The convention is the one that Hermes and Qwen models are trained on. Where the chat template has its own, ``Encoder``
sets ``options.tools`` to ``native``, and rows with tools are refused:

==================  ===========================================================================================
in the row          in the text
==================  ===========================================================================================
``tools``           the system message ends with the functions, one JSON object a line, and how to call them
``tool_calls``      the assistant's ``<tool_call>`` line feed ``{"name": ..., "arguments": ...}`` line feed
                    ``</tool_call>``, one after the other, after its text
a ``tool`` message  the user's ``<tool_response>`` line feed the result line feed ``</tool_response>``
reasoning           the assistant's ``<think>`` line feed the reasoning line feed ``</think>`` before its text
==================  ===========================================================================================
"""

import json
from dataclasses import dataclass
from typing import Any, Final

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.conversation import BadRowError, Role, kind_of
from phi3_lightning.data.decoding import decode_json, is_repr, python_repr
from phi3_lightning.data.fields import is_absent, read_alias
from phi3_lightning.data.message_fields import CALLS, CONTENT_PARTS, REASONING, ROLES, is_trained, role_of

TOOL_RESPONSE: Final = "<tool_response>"
_TOOL_ROLES: Final = {"tool", "function"}


@dataclass(slots=True)
class Turn:
    """One message as text."""

    role: Role
    content: str
    trained: bool | None
    """The message's own flag; None if it has no flag."""
    is_tool_result: bool
    where: str
    """Its place in the row, for errors."""


def read_messages(items: list[tuple[str, dict[str, Any]]], tools: object, options: RowOptions) -> list[Turn]:
    """Turn messages into turns, in order.

    Args:
        items: For each message its place in the row and its fields, as ``read_message`` names them.
        tools: The functions that may be called, as a list or its JSON; None or empty: no function.

    Raises:
        BadRowError: If a message is invalid, or holds what ``options`` refuse.
    """
    turns = [turn for where, item in items if (turn := _turn(item, where, options))]
    description = _describe_tools(tools, options)
    if not description:
        return turns
    if turns and turns[0].role == "system":
        turns[0].content += "\n\n" + description
        return turns
    return [Turn("system", description, None, is_tool_result=False, where="tools"), *turns]


def check_text(value: str, where: str) -> str:
    """Return a text with line feeds as ends of lines, as templates have them.

    Raises:
        BadRowError: If it holds half of a surrogate pair, and so cannot be written as UTF-8.
    """
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRowError("lone surrogate", f"{where} is not valid Unicode at character {error.start}") from None
    return value.replace("\r\n", "\n").replace("\r", "\n") if "\r" in value else value


def _turn(item: dict[str, Any], where: str, options: RowOptions) -> Turn | None:
    role = role_of(item, options)
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise BadRowError("unknown role", f"{where}.role is {role!r}; known are {known}; map others with data.role_map")
    text, extras = _content(item, where)
    is_tool_result = role in _TOOL_ROLES
    if extras or is_tool_result:
        _check_tools_allowed(options, where, tools=is_tool_result or any(kind == "call" for kind, _ in extras))
    if options.tools == "drop" and (is_tool_result or (extras and not text.strip())):
        return None
    if options.tools != "drop":
        thoughts = [f"<think>\n{extra}\n</think>" for kind, extra in extras if kind == "reasoning"]
        calls = [f"<tool_call>\n{extra}\n</tool_call>" for kind, extra in extras if kind == "call"]
        if extras:
            text = "\n\n".join(part for part in (*thoughts, text, "\n".join(calls)) if part)
        if is_tool_result:
            text = f"{TOOL_RESPONSE}\n{text}\n</tool_response>"
    return Turn(ROLES[role], check_text(text, f"{where}.content"), is_trained(item, where), is_tool_result, where)


def _content(item: dict[str, Any], where: str) -> tuple[str, list[tuple[str, str]]]:
    """The text of a message, and its reasoning and tool calls, each with its kind."""
    content = item.get("content")
    if isinstance(content, str) and len(item) == 2:
        return content, []  # most messages
    extras = []
    reasoning = read_alias(item, REASONING, where)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise BadRowError("reasoning is not text", f"{where} has {kind_of(reasoning)} as reasoning; give a string")
        extras.append(("reasoning", reasoning))
    calls = _decode(read_alias(item, CALLS, where)) or []
    calls = [calls] if isinstance(calls, dict) and is_absent(item.get("tool_calls")) else calls
    if not isinstance(calls, list):
        raise BadRowError("not a tool call", f"{where}.tool_calls is {kind_of(calls)}; give a list")
    if "content" not in item and not calls:
        raise BadRowError("no content", f"{where} has no content")
    if isinstance(content, list):
        parts = [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    else:
        parts = [] if content is None and calls else [("text", content)]
    texts = []
    for kind, value in parts:
        if not isinstance(value, str):
            raise BadRowError(
                "content is not text", f"{where}.content is {kind_of(value)}; give a string or text parts"
            )
        if kind == "text":
            texts.append(value)
        else:
            extras.append((kind, _call(value, f"{where}.content") if kind == "call" else value))
    extras += [("call", _call(call, f"{where}.tool_calls[{index}]")) for index, call in enumerate(calls)]
    return "".join(texts), extras


def _part(part: object, where: str) -> tuple[str, object]:
    """The kind of a part of a content (text, reasoning or call), and its value."""
    name = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(name, str) or name not in CONTENT_PARTS:
        kind = f"a part of type {name!r}" if isinstance(part, dict) else kind_of(part)
        known = ", ".join(CONTENT_PARTS)
        raise BadRowError("content is not text", f"{where} is {kind}; known are parts of type {known}")
    values = (part[key] for key in (name, "text", "value") if part.get(key) is not None)
    return CONTENT_PARTS[name], next(values, None)


def _call(call: object, where: str) -> str:
    call = _decode(call)
    call = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise BadRowError("not a tool call", f"{where} names no function; give an object with name and arguments")
    arguments = _decode(call.get("arguments", call.get("parameters", {})))  # the second is Llama's name
    if isinstance(arguments, str) and is_repr(arguments):
        raise python_repr(f"{where}.arguments")
    return json.dumps({"name": call["name"], "arguments": arguments}, ensure_ascii=False)


def _decode(value: object) -> object:
    """The value of a JSON text; any other value as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _describe_tools(tools: object, options: RowOptions) -> str:
    tools = decode_json(tools, "'tools'") if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return ""
    if not isinstance(tools, list):
        fault = f"'tools' is {kind_of(tools)}; give a list of functions, or its JSON"
        raise BadRowError("tools are not a list", fault)
    _check_tools_allowed(options, "'tools'")
    if options.tools == "drop":
        return ""
    functions = "\n".join(json.dumps(_decode(tool), ensure_ascii=False) for tool in tools)
    call = '<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>'
    return check_text(f"# Tools\n\nYou may call these functions:\n{functions}\n\nTo call one, write\n{call}", "tools")


def _check_tools_allowed(options: RowOptions, where: str, *, tools: bool = True) -> None:
    if options.tools == "refuse":
        raise BadRowError("tools are refused", f"{where} holds tools or reasoning; set data.tools: render or drop")
    if options.tools == "native" and tools:
        raise BadRowError(
            "tools of the template's own",
            f"{where} holds tools, and the chat template writes them in its own way, which is not supported yet; set "
            "data.tools: render to write them as text by the convention of Hermes, or drop",
        )
