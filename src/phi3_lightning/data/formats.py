"""A row of any known format becomes a conversation, a text, or ready-made tokens; or a named bad row."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

from phi3_lightning.config.data import FORMATS, SYSTEM, TOOLS, RowOptions
from phi3_lightning.data.conversation import BadRowError, Conversation, PlainText, TokenizedDocument, kind_of
from phi3_lightning.data.fields import (
    check_weight,
    is_absent,
    only,
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
    """Read a row for training.

    Args:
        row: A decoded row.
        options: Its format and how to treat what it holds.
        unused: Counts rows by the fields of theirs that nothing reads.

    Returns:
        What the row holds.

    Raises:
        BadRowError: The row has no known format, or cannot be trained.
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
    """Read a row for generation; an answer at its end is left out.

    Args:
        row: A decoded row with messages of any format, or a question alone.
        options: Its format and how to treat what it holds.
        unused: Counts rows by the fields of theirs that nothing reads.

    Returns:
        A conversation that ends where the assistant is to speak.

    Raises:
        BadRowError: The row has no known format, or does not lead to an answer.
    """
    fields, name, unread = _open(row, options)
    if name not in _READERS:
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
            raise BadRowError("column is missing", f"data.columns names {column!r} for '{field}'; found {_found(row)}")
    if columns:
        row, displaced = rename(row, columns)
    name = recognise(row, options.format)
    if name is None:
        raise _unknown_format(row, options)
    return row, name, {*displaced, *unused_fields(row, name, columns)} - key_columns(options)


def _unknown_format(fields: Mapping[str, Any], options: RowOptions) -> BadRowError:
    wanted = "messages" if options.format == "auto" else options.format
    return BadRowError(
        "unknown format",
        f"found {_found(fields)}; expected {' and '.join(map(repr, FORMATS[wanted]))}"
        + (f" or another of the formats {', '.join(FORMATS)}" if options.format == "auto" else "")
        + f"; name other columns with data.columns{suggest_table(list(fields))}",
    )


def _turns(fields: Mapping[str, Any], name: str, options: RowOptions, unread: set[str]) -> list[Turn]:
    items = _with_system(fields, _READERS[name](fields, options, unread), options)
    return read_messages(items, only(fields, TOOLS), options)


def _check_answer(fields: Mapping[str, Any], name: str, turns: list[Turn]) -> None:
    """Say which column lacks, where a question of a row has no answer."""
    *_, answer = FORMATS[name]
    if turns and turns[-1].role != "assistant" and len(FORMATS[name]) > 1 and fields.get(answer) is None:
        raise BadRowError(
            "last turn is not the assistant's",
            f"no '{answer}' answers it, found {_found(fields)}; name its column with data.columns, add the answer, "
            "or remove it",
        )


def suggest_table(columns: list[str]) -> str:
    """Guess which columns of a table hold one message a row.

    Args:
        columns: The names in the file's head.

    Returns:
        The options to set, or an empty text.
    """
    hints = {
        "conversation_column": ("conversation", "thread", "ticket", "session", "dialog", "chat", "case"),
        "role_column": ("role", "author", "sender", "speaker", "from"),
        "content_column": ("content", "message", "text", "body", "utterance"),
        "order_column": ("order", "time", "date", "created", "index", "turn", "position"),
    }
    guess: dict[str, str] = {}
    for option, words in hints.items():
        fitting = (c for word in words for c in columns if word in c.lower() and c not in guess.values())
        if found := next(fitting, None):
            guess[option] = found
    if not {"conversation_column", "role_column", "content_column"} <= guess.keys():
        return ""
    return "; one message a row? Try " + " ".join(f"--data.{option} {column}" for option, column in guess.items())


def _messages(fields: Mapping[str, Any], options: RowOptions, unread: set[str]) -> Items:
    return _read_list(fields["messages"], "messages", options, unread)


def _sharegpt(fields: Mapping[str, Any], options: RowOptions, unread: set[str]) -> Items:
    return _read_list(fields["conversations"], "conversations", options, unread)


def _alpaca(fields: Mapping[str, Any], options: RowOptions, unread: set[str]) -> Items:
    items: Items = []
    for index, pair in enumerate(read_list(fields.get("history") or [], "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRowError("not a message", f"history[{index}] is not a pair of question and answer")
        items += [
            (f"history[{index}]", {"role": role, "content": text}) for role, text in zip(_PAIR, pair, strict=True)
        ]
    parts = [key for key in ("instruction", "input") if not is_absent(fields.get(key))] or ["instruction"]
    question = "\n\n".join(_string(fields[key], key) for key in parts)
    items.append(("instruction", {"role": "user", "content": question}))
    return items + _answer(fields, "output", options, unread)


def _prompt_completion(fields: Mapping[str, Any], options: RowOptions, unread: set[str]) -> Items:
    prompt = fields["prompt"]
    if isinstance(prompt, list):
        items = _read_list(prompt, "prompt", options, unread)
    else:
        items = [("prompt", {"role": "user", "content": _string(prompt, "prompt")})]
    return items + _answer(fields, "completion", options, unread)


def _answer(fields: Mapping[str, Any], key: str, options: RowOptions, unread: set[str]) -> Items:
    value = fields.get(key)
    if isinstance(value, list):
        return _read_list(value, key, options, unread)
    return [] if value is None else [(key, {"role": "assistant", "content": _string(value, key)})]


_PAIR: Final = ("user", "assistant")
_READERS: Final[dict[str, Callable[[Mapping[str, Any], RowOptions, set[str]], Items]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}


def _read_list(value: object, key: str, options: RowOptions, unread: set[str]) -> Items:
    places = ((f"{key}[{index}]", item) for index, item in enumerate(read_list(value, key)))
    return [(where, read_message(item, where, options, unread)) for where, item in places]


def _with_system(fields: Mapping[str, Any], items: Items, options: RowOptions) -> Items:
    system = only(fields, SYSTEM)
    if system is None:
        return items
    own = [(where, item) for where, item in items if _is_system(item, options)]
    if [item.get("content") for _, item in own] == [system]:
        return items
    if own:
        raise BadRowError("two system messages", f"the row's 'system' and {own[0][0]} differ; keep one of them")
    return [("system", {"role": "system", "content": system}), *items]


def _is_system(item: dict[str, Any], options: RowOptions) -> bool:
    role = role_of(item, options)
    return isinstance(role, str) and ROLES.get(role) == "system"


def _string(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise BadRowError("content is not text", f"'{key}' is {kind_of(value)}; give a string")
    return check_text(value, key)


def _found(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, fields)) or "nothing"
