"""A row of any known format becomes a conversation, a text, or ready-made tokens; or a bad row, with the reason."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from phi3_lightning.config.data import FORMATS, SYSTEM, TOOLS, RowOptions
from phi3_lightning.data.conversation import BadRowError, Conversation, PlainText, TokenizedDocument, kind_of
from phi3_lightning.data.fields import (
    check_weight,
    is_absent,
    read_alias,
    read_list,
    recognise,
    rename,
    unused_fields,
)
from phi3_lightning.data.keys import key_columns
from phi3_lightning.data.message_fields import ROLES, read_message, role_of
from phi3_lightning.data.messages import Turn, check_text, read_messages
from phi3_lightning.data.tokens import read_tokens
from phi3_lightning.data.turns import prompt_turns, training_turns

Items = list[tuple[str, dict[str, Any]]]
"""Messages in OpenAI's shape, each with its place in the row."""


def parse_row(
    row: object, options: RowOptions, unused: Counter[str] | None = None
) -> Conversation | PlainText | TokenizedDocument:
    """Read a row for training; ``unused`` counts rows by the fields that nothing reads.

    Raises:
        BadRowError: If the row has no known format, or cannot be trained.
    """
    fields, name, unread = _open(row, options)
    check_weight(fields)
    parsed: Conversation | PlainText | TokenizedDocument
    if name == "text":
        parsed = PlainText(_string(fields["text"], "text"))
    elif name == "tokens":
        parsed = read_tokens(fields)
    else:
        turns = _turns(fields, name, options, unread)
        _check_answer(fields, name, turns)
        parsed = training_turns(turns, options)
    if unused is not None:
        unused.update(unread)
    return parsed


def parse_prompt(row: object, options: RowOptions, unused: Counter[str] | None = None) -> Conversation:
    """Read a row for generation: a chat, or a question alone, up to the assistant's turn; a last answer is left out.

    Raises:
        BadRowError: If the row has no known format, or no turn to answer.
    """
    fields, name, unread = _open(row, options)
    if name in ("text", "tokens"):
        raise BadRowError("not a chat", f"a row of format '{name}' has no turns that could be answered")
    prompt = prompt_turns(_turns(fields, name, options, unread), options)
    if unused is not None:
        unused.update(unread)
    return prompt


def _open(row: object, options: RowOptions) -> tuple[Mapping[str, Any], str, set[str]]:
    """The fields of a row, its format, and the names of the fields that nothing reads."""
    if not isinstance(row, dict):
        raise BadRowError("not an object", f"a row is a JSON object with named fields, not {kind_of(row)}")
    columns = options.columns or {}
    displaced: list[str] = []
    for field, column in columns.items():
        if column not in row:
            fault = f"data.columns names {column!r} for '{field}'; found {_names(row)}"
            raise BadRowError("column is missing", fault)
    if columns:
        row, displaced = rename(row, columns)
    name = recognise(row, options.format)
    if name is None:
        raise _unknown_format(row, options)
    return row, name, {*displaced, *unused_fields(row, name, columns)} - key_columns(options)


def _unknown_format(fields: Mapping[str, Any], options: RowOptions) -> BadRowError:
    expected = "messages" if options.format == "auto" else options.format
    return BadRowError(
        "unknown format",
        f"found {_names(fields)}; expected {' and '.join(map(repr, FORMATS[expected]))}"
        + (f" or another of the formats {', '.join(FORMATS)}" if options.format == "auto" else "")
        + f"; name other columns with data.columns{suggest_table(list(fields))}",
    )


def _turns(fields: Mapping[str, Any], name: str, options: RowOptions, unread: set[str]) -> list[Turn]:
    if name == "alpaca":
        items = _alpaca(fields) + _answer(fields, "output", options, unread)
    elif name == "prompt_completion":
        prompt = _read_items(fields["prompt"], "prompt", "user", options, unread)
        items = prompt + _answer(fields, "completion", options, unread)
    else:
        [key] = FORMATS[name]
        items = _read_list(fields[key], key, options, unread)
    return read_messages(_with_system(fields, items, options), read_alias(fields, TOOLS), options)


def _check_answer(fields: Mapping[str, Any], name: str, turns: list[Turn]) -> None:
    """Name the column that is missing if the question of a row has no answer."""
    *_, answer = FORMATS[name]
    if turns and turns[-1].role != "assistant" and len(FORMATS[name]) > 1 and fields.get(answer) is None:
        raise BadRowError(
            "last turn is not the assistant's",
            f"no '{answer}' answers it, found {_names(fields)}; name its column with data.columns, add the answer, "
            "or remove it",
        )


def suggest_table(columns: list[str]) -> str:
    """Guess the role of each column of a table with one message a row.

    Returns:
        The end of an error text, with the options to set; empty if it does not look like such a table.
    """
    hints = {
        "conversation_column": ("conversation", "thread", "ticket", "session", "dialog", "chat", "case"),
        "role_column": ("role", "author", "sender", "speaker", "from"),
        "content_column": ("content", "message", "text", "body", "utterance"),
        "order_column": ("order", "time", "date", "created", "index", "turn", "position"),
    }
    guess: dict[str, str] = {}
    for option, words in hints.items():
        matches = (c for word in words for c in columns if word in c.lower() and c not in guess.values())
        if column := next(matches, None):
            guess[option] = column
    if not {"conversation_column", "role_column", "content_column"} <= guess.keys():
        return ""
    return "; one message a row? Try " + " ".join(f"--data.{option} {column}" for option, column in guess.items())


def _alpaca(fields: Mapping[str, Any]) -> Items:
    items: Items = []
    for index, pair in enumerate(read_list(fields.get("history") or [], "history")):
        where = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRowError("not a message", f"{where} is not a pair of question and answer")
        question, answer = pair
        items += [(where, {"role": "user", "content": question}), (where, {"role": "assistant", "content": answer})]
    keys = [key for key in ("instruction", "input") if not is_absent(fields.get(key))] or ["instruction"]
    instruction = "\n\n".join(_string(fields[key], key) for key in keys)
    return [*items, ("instruction", {"role": "user", "content": instruction})]


def _answer(fields: Mapping[str, Any], key: str, options: RowOptions, unread: set[str]) -> Items:
    return [] if fields.get(key) is None else _read_items(fields[key], key, "assistant", options, unread)


def _read_items(value: object, key: str, role: str, options: RowOptions, unread: set[str]) -> Items:
    if isinstance(value, list):
        return _read_list(value, key, options, unread)
    return [(key, {"role": role, "content": _string(value, key)})]


def _read_list(value: object, key: str, options: RowOptions, unread: set[str]) -> Items:
    places = ((f"{key}[{index}]", item) for index, item in enumerate(read_list(value, key)))
    return [(where, read_message(item, where, options, unread)) for where, item in places]


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


def _string(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise BadRowError("content is not text", f"'{key}' is {kind_of(value)}; give a string")
    return check_text(value, key)


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, fields)) or "nothing"
