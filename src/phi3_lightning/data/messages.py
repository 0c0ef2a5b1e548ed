"""Messages in OpenAI's shape become plain turns; tool calls and reasoning become text by one convention.

The convention is the one that Hermes and Qwen models are trained on; where the chat template has another, ``Encoder``
sets ``options.tools`` to ``native``, and rows with tools are refused:

==================  ===========================================================================================
in the row          in the text
==================  ===========================================================================================
``tools``           the system message ends with the functions, one JSON object a line, and how to call them
``tool_calls``      the assistant says ``<tool_call>`` line feed ``{"name": ..., "arguments": ...}`` line feed
                    ``</tool_call>``, one after the other, behind its words
a ``tool`` message  the user says ``<tool_response>`` line feed the result line feed ``</tool_response>``
reasoning           the assistant says ``<think>`` line feed the reasoning line feed ``</think>`` before its words
==================  ===========================================================================================
"""

import json
from dataclasses import dataclass
from typing import Any, Final

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.conversation import BadRowError, Role, kind_of
from phi3_lightning.data.decoding import decode_json, is_repr, python_repr
from phi3_lightning.data.fields import is_absent, only
from phi3_lightning.data.message_fields import CALLS, PARTS, REASONING, ROLES, is_trained, role_of

TOOL_RESPONSE: Final = "<tool_response>"
_TOOL_ROLES: Final = {"tool", "function"}


@dataclass(slots=True)
class Turn:
    """One message as text.

    Args:
        role: Who speaks.
        content: What is said.
        trained: Whether the row says that it is trained or not; None: it does not say.
        tool: Whether it is a tool's result.
        where: Its place in the row, for messages to the user.
    """

    role: Role
    content: str
    trained: bool | None
    tool: bool
    where: str


def read_messages(items: list[tuple[str, dict[str, Any]]], tools: object, options: RowOptions) -> list[Turn]:
    """Read messages.

    Args:
        items: For each message its place in the row and its fields, as ``read_message`` names them.
        tools: The functions that may be called, as a list or its JSON; None or empty: none.
        options: What becomes of tools, and other names for roles.

    Returns:
        The turns, in order.

    Raises:
        BadRowError: A message is not one, or holds what ``options`` refuse.
    """
    turns = [turn for where, item in items if (turn := _turn(item, where, options))]
    described = _describe_tools(tools, options)
    if not described:
        return turns
    if turns and turns[0].role == "system":
        turns[0].content += "\n\n" + described
        return turns
    return [Turn("system", described, None, tool=False, where="tools"), *turns]


def check_text(value: str, where: str) -> str:
    """See that a text can be written as UTF-8, and give its lines one kind of end.

    Args:
        value: The text.
        where: Its place in the row.

    Returns:
        The text, whose lines end in line feeds, as those of templates do.

    Raises:
        BadRowError: It holds half of a surrogate pair.
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
        raise BadRowError("unknown role", f"{where}.role is {role!r}; known are {known}, others map with data.role_map")
    words, extras = _content(item, where)
    if extras or role in _TOOL_ROLES:
        _refuse_tools(options, where, tools=role in _TOOL_ROLES or any(kind == "call" for kind, _ in extras))
    if options.tools == "drop" and (role in _TOOL_ROLES or (extras and not words.strip())):
        return None
    if options.tools != "drop":
        thoughts = [f"<think>\n{text}\n</think>" for kind, text in extras if kind == "reasoning"]
        calls = [f"<tool_call>\n{text}\n</tool_call>" for kind, text in extras if kind == "call"]
        if extras:
            words = "\n\n".join(part for part in (*thoughts, words, "\n".join(calls)) if part)
        if role in _TOOL_ROLES:
            words = f"{TOOL_RESPONSE}\n{words}\n</tool_response>"
    text = check_text(words, f"{where}.content")
    return Turn(ROLES[role], text, is_trained(item, where), role in _TOOL_ROLES, where)


def _content(item: dict[str, Any], where: str) -> tuple[str, list[tuple[str, str]]]:
    """The words of a message, and its reasoning and tool calls."""
    content = item.get("content")
    if isinstance(content, str) and len(item) == 2:
        return content, []  # as most messages are
    extras = []
    reasoning = only(item, REASONING, where)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise BadRowError("reasoning is not text", f"{where} has {kind_of(reasoning)} as reasoning; give a string")
        extras.append(("reasoning", reasoning))
    calls = _decoded(only(item, CALLS, where)) or []
    calls = [calls] if isinstance(calls, dict) and is_absent(item.get("tool_calls")) else calls
    if not isinstance(calls, list):
        raise BadRowError("not a tool call", f"{where}.tool_calls is {kind_of(calls)}; give a list")
    if "content" not in item and not calls:
        raise BadRowError("no content", f"{where} has no content")
    if isinstance(content, list):
        parts = [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    else:
        parts = [] if content is None and calls else [("text", content)]
    words = []
    for kind, text in parts:
        if not isinstance(text, str):
            raise BadRowError("content is not text", f"{where}.content is {kind_of(text)}; give a string or text parts")
        if kind == "text":
            words.append(text)
        else:
            extras.append((kind, _call(text, f"{where}.content") if kind == "call" else text))
    extras += [("call", _call(call, f"{where}.tool_calls[{index}]")) for index, call in enumerate(calls)]
    return "".join(words), extras


def _part(part: object, where: str) -> tuple[str, object]:
    """A part's kind (text, reasoning or call) and its text."""
    name = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(name, str) or name not in PARTS:
        found = f"a part of type {name!r}" if isinstance(part, dict) else kind_of(part)
        raise BadRowError("content is not text", f"{where} is {found}; known are parts of type {', '.join(PARTS)}")
    texts = (part[key] for key in (name, "text", "value") if part.get(key) is not None)
    return PARTS[name], next(texts, None)


def _call(call: object, where: str) -> str:
    call = _decoded(call)
    call = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise BadRowError("not a tool call", f"{where} names no function; give an object with name and arguments")
    arguments = _decoded(call.get("arguments", call.get("parameters", {})))  # the second is Llama's name
    if isinstance(arguments, str) and is_repr(arguments):
        raise python_repr(f"{where}.arguments")
    return json.dumps({"name": call["name"], "arguments": arguments}, ensure_ascii=False)


def _decoded(value: object) -> object:
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
        raise BadRowError("tools are no list", f"'tools' is {kind_of(tools)}; give a list of functions, or its JSON")
    _refuse_tools(options, "'tools'")
    if options.tools == "drop":
        return ""
    functions = "\n".join(json.dumps(_decoded(tool), ensure_ascii=False) for tool in tools)
    call = '<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>'
    return check_text(f"# Tools\n\nYou may call these functions:\n{functions}\n\nTo call one, write\n{call}", "tools")


def _refuse_tools(options: RowOptions, where: str, *, tools: bool = True) -> None:
    if options.tools == "refuse":
        raise BadRowError("tools are refused", f"{where} holds tools or reasoning; set data.tools: render or drop")
    if options.tools == "native" and tools:
        raise BadRowError(
            "tools of the template's own",
            f"{where} holds tools, and the chat template writes them in its own way, which is not supported yet; set "
            "data.tools: render to write them as text by the convention of Hermes, or drop",
        )
