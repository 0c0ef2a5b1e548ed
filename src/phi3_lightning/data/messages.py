"""Messages in OpenAI's shape become plain turns; tool calls and reasoning become text by one convention.

The convention is the one that Hermes and Qwen models are trained on:

==================  ===========================================================================================
in the row          in the text
==================  ===========================================================================================
``tools``           the system message ends with the functions, one JSON object a line, and how to call them
``tool_calls``      the assistant's ``<tool_call>`` line feed ``{"name": ..., "arguments": ...}`` line feed
                    ``</tool_call>``, one after the other, after its text
a ``tool`` message  the user's ``<tool_response>`` line feed the result line feed ``</tool_response>``
reasoning           the assistant's ``<think>`` line feed the reasoning line feed ``</think>`` before its text
==================  ===========================================================================================

Under ``data.tools: native`` tools, calls and results stay what they are, for the chat template; reasoning is text.
"""

import json
from dataclasses import dataclass, field, replace
from typing import Any, Final

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.conversation import BadRowError, Role, kind_of
from phi3_lightning.data.decoding import decode_json, is_repr, python_repr
from phi3_lightning.data.fields import is_absent, read_alias
from phi3_lightning.data.message_fields import CALLS, CONTENT_PARTS, REASONING, ROLES, TOOL_ROLES, is_trained, role_of

TOOL_RESPONSE: Final = "<tool_response>"


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
    calls: list[dict[str, Any]] = field(default_factory=list)
    """Its tool calls in OpenAI's shape, under ``data.tools: native``."""
    tool_call_id: str | None = None
    name: str | None = None
    tools: list[Any] | str | None = None
    """The functions of the whole row, under ``data.tools: native``."""


def read_messages(items: list[tuple[str, dict[str, Any]]], tools: object, options: RowOptions) -> list[Turn]:
    """Turn messages into turns, in order.

    Args:
        items: For each message its place in the row and its fields, as ``read_message`` names them.
        tools: The functions that may be called, as a list or its JSON; None or empty: no function.

    Raises:
        BadRowError: If a message is invalid, or holds what ``options`` refuse.
    """
    turns = [turn for where, item in items if (turn := _turn(item, where, options))]
    functions = _read_tools(_choose_tools(items, tools, options), options)
    if not functions:
        return turns
    if options.tools == "native":
        return [replace(turn, tools=functions) for turn in turns]
    description = _describe_tools(functions)
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
    is_tool_result = role in TOOL_ROLES
    if options.tools == "refuse" and (extras or is_tool_result):
        raise _refused(where)
    if options.tools == "drop" and (is_tool_result or (extras and not text.strip())):
        return None
    turn = Turn(ROLES[role], "", is_trained(item, where), is_tool_result, where)
    calls = [call for kind, call in extras if kind == "call"]
    if options.tools == "native":
        turn.calls = [_native_call(call, where) for call in calls]
        if is_tool_result:
            turn.role = "tool"
            turn.tool_call_id, turn.name = _string(item, "tool_call_id"), _string(item, "name")
    if options.tools != "drop" and extras:
        thoughts = [f"<think>\n{extra}\n</think>" for kind, extra in extras if kind == "reasoning"]
        rendered = [] if options.tools == "native" else [_hermes_call(call) for call in calls]
        text = "\n\n".join(part for part in (*thoughts, text, "\n".join(rendered)) if part)
    if is_tool_result and options.tools != "native":
        text = f"{TOOL_RESPONSE}\n{text}\n</tool_response>"
    turn.content = check_text(text, f"{where}.content")
    return turn


def _hermes_call(call: dict[str, Any]) -> str:
    return f"<tool_call>\n{_json({'name': call['name'], 'arguments': call['arguments']})}\n</tool_call>"


def _string(item: dict[str, Any], key: str) -> str | None:
    value = item.get(key)
    return value if isinstance(value, str) else None


def _native_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A call as templates take it: its arguments are an object, which OpenAI's API writes as JSON."""
    arguments = {} if is_absent(call["arguments"]) else call["arguments"]
    if not isinstance(arguments, dict):
        raise BadRowError(
            "not a tool call", f"the arguments of {call['name']!r} in {where} are {kind_of(arguments)}; give an object"
        )
    check_text(_json(arguments), f"{where}.tool_calls")
    number = {"id": call["id"]} if "id" in call else {}
    return number | {"type": "function", "function": {"name": call["name"], "arguments": arguments}}


def _content(item: dict[str, Any], where: str) -> tuple[str, list[tuple[str, Any]]]:
    """The text of a message, and its reasoning and tool calls, each with its kind."""
    content = item.get("content")
    if isinstance(content, str) and len(item) == 2:
        return content, []  # most messages
    extras: list[tuple[str, Any]] = []
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
            extras.append((kind, value if kind == "reasoning" else _call(value, f"{where}.content")))
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


def _call(call: object, where: str) -> dict[str, Any]:
    """Name and arguments of a tool call, and its id if it has one."""
    call = _decode(call)
    number = call.get("id") if isinstance(call, dict) else None
    call = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise BadRowError("not a tool call", f"{where} names no function; give an object with name and arguments")
    arguments = _decode(call.get("arguments", call.get("parameters", {})))  # the second is Llama's name
    if isinstance(arguments, str) and is_repr(arguments):
        raise python_repr(f"{where}.arguments")
    return {"name": call["name"], "arguments": arguments} | ({"id": number} if isinstance(number, str) else {})


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _decode(value: object) -> object:
    """The value of a JSON text; any other value as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _choose_tools(items: list[tuple[str, dict[str, Any]]], tools: object, options: RowOptions) -> object:
    """The row's tools, which its system message may hold instead, as Phi-4-mini's template has them."""
    for where, item in items:
        inner = None if is_absent(item.get("tools")) else item["tools"]
        if inner is None or ROLES.get(str(role_of(item, options))) != "system":
            continue
        if not is_absent(tools) and _decode(tools) != _decode(inner):
            raise BadRowError("two fields for one thing", f"the row's 'tools' and those of {where} differ; keep one")
        tools = inner if is_absent(tools) else tools
    return tools


def _read_tools(tools: object, options: RowOptions) -> list[Any] | str | None:
    """The functions that may be called; a JSON text stays one for templates that write it as it is."""
    decoded = decode_json(tools, "'tools'") if isinstance(tools, str) and tools.strip() else tools
    if not decoded:
        return None
    if not isinstance(decoded, list):
        fault = f"'tools' is {kind_of(decoded)}; give a list of functions, or its JSON"
        raise BadRowError("tools are not a list", fault)
    if options.tools == "refuse":
        raise _refused("'tools'")
    if options.tools == "drop":
        return None
    if options.tools != "native":
        return decoded
    check_text(_json(decoded), "tools")
    return tools if isinstance(tools, str) else [_decode(tool) for tool in decoded]


def _describe_tools(tools: list[Any] | str) -> str:
    functions = "\n".join(_json(_decode(tool)) for tool in tools)
    call = '<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>'
    return check_text(f"# Tools\n\nYou may call these functions:\n{functions}\n\nTo call one, write\n{call}", "tools")


def _refused(where: str) -> BadRowError:
    return BadRowError("tools are refused", f"{where} holds tools or reasoning; set data.tools: render, native or drop")
