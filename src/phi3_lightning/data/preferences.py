"""Rows of preferences: pairs of a better and a worse answer (DPO and the like), and answers with a label (KTO).

================================================  ===================================================================
in the row                                        read as
================================================  ===================================================================
``chosen``, ``rejected``: a text or a message     the answer to the row's prompt: ``prompt``, a text or messages, or
                                                  ``messages``, ``conversations``, or Alpaca's ``instruction``
lists that begin with the assistant's turn        the same, with several turns
lists that begin with a system or user message    whole conversations; the messages with which both begin are the prompt
``label`` beside a chat                           whether the last answer is good, or all of ``completion``
================================================  ===================================================================
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from phi3_lightning.config.data import FIELDS, SYSTEM, TOOLS, RowOptions
from phi3_lightning.data.conversation import BadRowError, Conversation, PreferencePair, common_length
from phi3_lightning.data.decoding import python_repr
from phi3_lightning.data.fields import is_absent, prompt_format, read_flag
from phi3_lightning.data.items import Items, read_items, read_prompt, read_turns
from phi3_lightning.data.message_fields import ROLES, read_message, role_of
from phi3_lightning.data.messages import Turn
from phi3_lightning.data.turns import order_turns, training_turns

_SIDES: Final = ("chosen", "rejected")
_REPR: Final = re.compile(r"\s*\[?\s*\{'(role|content|from|value)'")  # Python's repr of messages


def read_pair(fields: Mapping[str, Any], options: RowOptions, unread: set[str]) -> PreferencePair:
    """Read a row with ``chosen`` and ``rejected``.

    Args:
        unread: Receives the names of fields that nothing reads.

    Raises:
        BadRowError: If an answer is empty or both are equal, the prompts differ, or there is no prompt.
    """
    chosen, rejected = (_conversation(fields, side, options, unread) for side in _SIDES)
    if chosen.messages == rejected.messages:
        raise BadRowError("chosen equals rejected", "a pair is two different answers to one prompt; remove the row")
    count = common_length(chosen.messages, rejected.messages)
    _check_prompts(chosen, rejected, count)
    return PreferencePair(_train_answer(chosen, count, "'chosen'"), _train_answer(rejected, count, "'rejected'"))


def read_label(fields: Mapping[str, Any]) -> bool:
    """Return whether an answer is good, by ``label``.

    Raises:
        BadRowError: If it is missing, or neither true nor false, nor 1 or 0.
    """
    value: Any = fields.get("label")
    if is_absent(value):
        names = ", ".join(map(repr, fields))
        raise BadRowError("no label", f"found {names}; 'label' is true for a good answer and false for a bad one")
    if value in (0, 1, "0", "1"):
        return bool(int(value))
    flag = read_flag(value)
    if flag is None:
        raise BadRowError("label is not true or false", f"'label' is {value!r}; give true or false, or 1 or 0")
    return flag


def trained_answer(conversation: Conversation, turns: list[Turn], options: RowOptions) -> Conversation:
    """Return a conversation of which only the answer is supervised: its last turn, or all of ``completion``.

    Args:
        turns: The turns that it was made of.

    Raises:
        BadRowError: If the answer is empty.
    """
    count = len(conversation.messages) - 1
    prompt = [turn for turn in turns if not turn.where.startswith("completion")]
    if len(prompt) < len(turns):
        count = len(order_turns(prompt, options))
    return _train_answer(conversation, count, "the answer")


def _train_answer(conversation: Conversation, count: int, name: str) -> Conversation:
    """A conversation with nothing supervised within its first ``count`` messages."""
    answers = [message for message in conversation.messages[count:] if message["role"] == "assistant"]
    if not any(message["content"].strip() or "tool_calls" in message for message in answers):
        raise BadRowError("empty answer", f"{name} is empty; remove the row")
    trained = [flag and index >= count for index, flag in enumerate(conversation.trained)]
    return replace(conversation, trained=trained)


def _conversation(fields: Mapping[str, Any], side: str, options: RowOptions, unread: set[str]) -> Conversation:
    """The whole conversation of one side of a pair."""
    turns = _turns(fields, side, options, unread)
    try:
        return training_turns(turns, options)
    except BadRowError as error:
        raise BadRowError(error.reason, f"in {side!r}: {error.detail}") from None


def _turns(fields: Mapping[str, Any], side: str, options: RowOptions, unread: set[str]) -> list[Turn]:
    answer = _answer(fields[side], side, options, unread)
    name = prompt_format(fields)
    if not _begins_before_the_assistant(answer, options):
        if name is None:
            raise _no_prompt(fields, side)
        return read_turns(fields, _prompt(fields, name, options, unread) + answer, options)
    turns = read_turns(fields, answer, options)
    if name == "prompt_completion":
        _check_prompt(fields, turns, side, options, unread)
    elif name is not None:  # another rendering of the same chat
        others = FIELDS[name].intersection(fields) - {*SYSTEM, *TOOLS}
        unread.update(key for key in others if not is_absent(fields[key]))
    return turns


def _answer(value: object, side: str, options: RowOptions, unread: set[str]) -> Items:
    if is_absent(value):
        raise BadRowError("empty answer", f"{side!r} is empty; remove the row")
    value = _decode_cell(value, side)
    if isinstance(value, dict):
        return [(side, read_message(value, side, options, unread))]
    return read_items(value, side, "assistant", options, unread)


def _prompt(fields: Mapping[str, Any], name: str, options: RowOptions, unread: set[str]) -> Items:
    if name == "prompt_completion":
        return read_items(_decode_cell(fields["prompt"], "prompt"), "prompt", "user", options, unread)
    return read_prompt(fields, name, options, unread)


def _decode_cell(value: object, where: str) -> object:
    """The message or messages that a cell of CSV holds as JSON; any other value as it is.

    Raises:
        BadRowError: If they are Python's repr.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError):
        if _REPR.match(value):
            raise python_repr(f"'{where}'") from None
        return value
    messages = decoded if isinstance(decoded, list) else [decoded]
    return decoded if messages and all(map(_is_message, messages)) else value


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and bool(
        value.keys() & {"role", "from"} and value.keys() & {"content", "value", "tool_calls"}
    )


def _begins_before_the_assistant(items: Items, options: RowOptions) -> bool:
    roles = (ROLES.get(str(role_of(item, options))) for _, item in items)
    return next((role for role in roles if role != "system"), None) != "assistant"


def _check_prompt(
    fields: Mapping[str, Any], turns: list[Turn], side: str, options: RowOptions, unread: set[str]
) -> None:
    """Check that ``prompt`` is the beginning of a whole conversation or, as a text, one of its questions."""
    items = _prompt(fields, "prompt_completion", options, unread)
    if items[0][0] == "prompt":  # a text
        question = items[0][1]["content"].strip()
        agrees = any(turn.role == "user" and turn.content.strip() == question for turn in turns)
    else:
        prompt = [(turn.role, turn.content) for turn in read_turns(fields, items, options)]
        agrees = prompt == [(turn.role, turn.content) for turn in turns[: len(prompt)]]
    if not agrees:
        raise BadRowError(
            "prompts differ", f"{side!r} is a whole conversation that does not contain 'prompt'; remove one of the two"
        )


def _check_prompts(chosen: Conversation, rejected: Conversation, count: int) -> None:
    for side, conversation in zip(_SIDES, (chosen, rejected), strict=True):
        rest = conversation.messages[count:]
        if not rest:
            raise BadRowError("no answer", f"{side!r} ends within the messages that both share; give it an answer")
        if rest[0]["role"] != "assistant":
            role = rest[0]["role"]
            raise BadRowError(
                "prompts differ",
                f"chosen and rejected differ first in message {count + 1}, which is the {role}'s in {side!r}; a pair "
                "is two answers to the same messages",
            )


def _no_prompt(fields: Mapping[str, Any], side: str) -> BadRowError:
    names = ", ".join(map(repr, fields))
    return BadRowError(
        "no prompt",
        f"nothing precedes {side!r}, found {names}; name the column of the prompt with data.columns: "
        "{prompt: ...}; a transcript in one text has to be split into messages",
    )
