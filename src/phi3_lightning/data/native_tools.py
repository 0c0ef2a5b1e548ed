"""Tools as a chat template writes them, for ``data.tools: native``: where it reads them is found by trying.

=================  =================================================================================================
of the chat        given to the template as
=================  =================================================================================================
the functions      ``tools`` of the call, as servers do; or, of templates that read them there as Phi-4-mini's does,
                   ``tools`` of the system message, which is empty if the chat has none
a call             ``tool_calls`` with arguments as objects, or as JSON if the template would write Python's repr; of
                   templates that write no calls, text after the content, between the tokenizer's ``<|tool_call|>``
                   and ``<|/tool_call|>``
a tool's result    a message of the role ``tool``
=================  =================================================================================================
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, Final, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from phi3_lightning.data.conversation import BadRowError, Conversation, Message

TEMPLATE_ERRORS: Final = (TemplateError, TypeError, ValueError, KeyError)
"""What a chat template may raise."""

_CALL_TOKENS: Final = ("<|tool_call|>", "<|/tool_call|>")
_REMEDY: Final = "set data.tools: render to write them as text by the convention of Hermes, or drop"
_Place = Literal["argument", "argument beside a system message", "text of the system message", "system message"]
_CallForm = Literal["objects", "JSON", "text"]

_FUNCTION: Final = {
    "type": "function",
    "function": {
        "name": "probe_function",
        "description": "Probes.",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}, "required": ["probe_key"]},
    },
}
_SYSTEM: Final[Message] = {"role": "system", "content": "first"}
_USER: Final[Message] = {"role": "user", "content": "second"}


class NativeTools:
    """Gives the tools of conversations to a tokenizer's chat template in the form that it takes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, special_text: re.Pattern[str]) -> None:
        self._tokenizer = tokenizer
        self._special_text = special_text

    def adapt(self, conversation: Conversation) -> Conversation | BadRowError:
        """Return a conversation as the template takes it, or why the template cannot write it."""
        messages = conversation.messages
        if conversation.tools is None and not any("tool_calls" in message for message in messages):
            return conversation
        try:
            self._check_special_text(conversation)
            messages = [self._with_calls(message, index) for index, message in enumerate(messages)]
            return self._with_tools(replace(conversation, messages=messages))
        except BadRowError as error:
            return error

    def _check_special_text(self, conversation: Conversation) -> None:
        texts = [message["content"] + _json(message["tool_calls"]) for message in conversation.messages
                 if "tool_calls" in message]  # fmt: skip
        if special := self._special_text.search("\n".join([*texts, _as_text(conversation.tools or [])])):
            raise BadRowError("special-token text", f"{special.group()!r} within tools or a message that calls them")

    def _with_calls(self, message: Message, index: int) -> Message:
        if "tool_calls" not in message or self._call_form == "objects":
            return message
        calls = [call["function"] for call in message["tool_calls"]]
        if self._call_form == "text":
            opening, closing = _CALL_TOKENS
            return {**message, "content": f"{message['content']}{opening}{_json(calls)}{closing}"}
        if self._call_form is None:
            fault = f"messages[{index}] calls a tool, which the chat template does not write; {_REMEDY}"
            raise BadRowError("the chat template writes no tool calls", fault)
        return {
            **message,
            "tool_calls": [
                call | {"function": call["function"] | {"arguments": _json(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ],
        }

    def _with_tools(self, conversation: Conversation) -> Conversation:
        tools = conversation.tools
        if tools is None:
            return conversation
        if self._place is None:
            fault = f"the row has tools, which it writes nowhere; {_REMEDY}"
            raise BadRowError("the chat template writes no tools", fault)
        messages, trained = list(conversation.messages), conversation.trained
        if self._place != "argument" and messages[0]["role"] != "system":
            messages, trained = [{"role": "system", "content": ""}, *messages], [False, *trained]
        if self._place.startswith("argument"):
            return Conversation(messages, trained, _as_list(tools))
        in_message = _as_text(tools) if self._place.startswith("text") else _as_list(tools)
        messages[0] = {**messages[0], "tools": in_message}
        return Conversation(messages, trained)

    @cached_property
    def _place(self) -> _Place | None:
        """Where the template reads the functions; None: nowhere."""
        text = _json([_FUNCTION])
        attempts: list[tuple[_Place, list[Message], list[Any] | None, Callable[[str], bool]]] = [
            ("argument", [_USER], [_FUNCTION], _has_json),
            ("argument beside a system message", [_SYSTEM, _USER], [_FUNCTION], _has_json),
            ("text of the system message", [{**_SYSTEM, "tools": text}, _USER], None, lambda result: text in result),
            ("system message", [{**_SYSTEM, "tools": [_FUNCTION]}, _USER], None, _has_json),
        ]
        return next((place for place, chat, tools, works in attempts if works(self._try(chat, tools))), None)

    @cached_property
    def _call_form(self) -> _CallForm | None:
        """How the template takes calls; None: not at all."""
        arguments: dict[_CallForm, Any] = {"objects": {"probe_key": 5}, "JSON": _json({"probe_key": 5})}
        for form, value in arguments.items():
            call = {"id": "call00001", "type": "function", "function": {"name": "probe_call", "arguments": value}}
            result: Message = {"role": "tool", "content": "third", "tool_call_id": "call00001", "name": "probe_call"}
            text = self._try([_USER, {"role": "assistant", "content": "", "tool_calls": [call]}, result], None)
            if "probe_call" in text and re.search(r'"probe_key"\s*:\s*5', text):
                return form
        return "text" if set(_CALL_TOKENS) <= self._tokenizer.get_added_vocab().keys() else None

    def _try(self, chat: list[Message], tools: list[Any] | None) -> str:
        """The text of a chat; an empty one if the template raises."""
        render: Any = self._tokenizer.apply_chat_template  # its annotations know no TypedDict
        try:
            return str(render(chat, tools=tools, tokenize=False))
        except TEMPLATE_ERRORS:
            return ""


def _has_json(text: str) -> bool:
    """Whether a text holds the probe's function, and not as Python's repr."""
    return "probe_function" in text and "'probe_function'" not in text


def _as_list(tools: list[Any] | str) -> list[Any]:
    functions: list[Any] = json.loads(tools) if isinstance(tools, str) else tools
    return functions


def _as_text(tools: list[Any] | str) -> str:
    return tools if isinstance(tools, str) else _json(tools)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
