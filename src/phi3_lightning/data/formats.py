"""A row of any known format becomes a conversation, a text, or ready-made tokens; or a named bad row."""

import json
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any, Final

from phi3_lightning.batch import IGNORE_INDEX
from phi3_lightning.data.conversation import BadRowError, Conversation, Encoded, PlainText, kind_of
from phi3_lightning.data.messages import check_text, read_messages
from phi3_lightning.data.options import FORMATS, RowOptions
from phi3_lightning.data.turns import prompt_turns, training_turns

SHAREGPT_ROLES: Final = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
}

Raw = tuple[list[object], object]
"""Messages in OpenAI's shape, and the tools that they may call."""


def parse_row(row: object, options: RowOptions) -> Conversation | PlainText | Encoded:
    """Read a row for training.

    Args:
        row: A decoded row.
        options: Its format and how to treat what it holds.

    Returns:
        What the row holds.

    Raises:
        BadRowError: The row has no known format, or cannot be trained.
    """
    fields = _fields(row, options)
    name = _recognise(fields, options)
    if name == "text":
        return PlainText(_string(fields["text"], "text"))
    if name == "tokens":
        return _tokens(fields)
    return training_turns(read_messages(*_READERS[name](fields), options), options)


def parse_prompt(row: object, options: RowOptions) -> Conversation:
    """Read a row for generation; an answer at its end is left out.

    Args:
        row: A decoded row with messages of any format, or a ``prompt`` alone.
        options: Its format and how to treat what it holds.

    Returns:
        A conversation that ends where the assistant is to speak.

    Raises:
        BadRowError: The row has no known format, or does not lead to an answer.
    """
    fields = _fields(row, options)
    name = _recognise(fields, options)
    if name not in _READERS:
        raise BadRowError("not a chat", f"a row of format '{name}' has no turns that could be answered")
    return prompt_turns(read_messages(*_READERS[name](fields), options), options)


def _fields(row: object, options: RowOptions) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise BadRowError("not an object", f"a row is a JSON object with named fields, not {kind_of(row)}")
    for name, column in (options.columns or {}).items():
        if column not in row:
            raise BadRowError("column is missing", f"data.columns names {column!r} for '{name}'; found {_found(row)}")
    return row | {name: row[column] for name, column in (options.columns or {}).items()}


def _recognise(fields: Mapping[str, Any], options: RowOptions) -> str:
    # Tables have every column in every row, so a format whose fields are null is only meant where no other fits.
    filled = [name for name, keys in FORMATS.items() if all(fields.get(key) is not None for key in keys)]
    names = filled or [name for name, keys in FORMATS.items() if all(key in fields for key in keys)]
    if options.format == "auto" and names:
        return names[0]
    if options.format in names:
        return options.format
    wanted = "messages" if options.format == "auto" else options.format
    raise BadRowError(
        "unknown format",
        f"found {_found(fields)}; expected {' and '.join(map(repr, FORMATS[wanted]))}"
        + (f" or another of the formats {', '.join(FORMATS)}" if options.format == "auto" else "")
        + f"; name other columns with data.columns{suggest_table(list(fields))}",
    )


def suggest_table(columns: list[str]) -> str:
    """Guess which columns of a table hold one message a row.

    Args:
        columns: The names in the file's head.

    Returns:
        The options to set, or an empty text.
    """
    hints = {
        "conversation_id": ("conversation", "thread", "ticket", "session", "dialog", "chat", "case"),
        "role": ("role", "author", "sender", "speaker", "from"),
        "content": ("content", "message", "text", "body", "utterance"),
        "order": ("order", "time", "date", "created", "index", "turn", "position"),
    }
    guess: dict[str, str] = {}
    for option, words in hints.items():
        fitting = (c for word in words for c in columns if word in c.lower() and c not in guess.values())
        if found := next(fitting, None):
            guess[option] = found
    if not {"conversation_id", "role", "content"} <= guess.keys():
        return ""
    return "; one message a row? Try " + " ".join(f"--data.{option} {column}" for option, column in guess.items())


def _messages(fields: Mapping[str, Any]) -> Raw:
    return _list(fields["messages"], "messages"), fields.get("tools")


def _sharegpt(fields: Mapping[str, Any]) -> Raw:
    items = [_sharegpt_item(item) for item in _list(fields["conversations"], "conversations")]
    return _with_system(fields, items), fields.get("tools")


def _sharegpt_item(item: object) -> object:
    if not isinstance(item, dict) or "from" not in item:
        return item
    name, value = item["from"], item.get("value")
    message = {**item, "role": SHAREGPT_ROLES.get(name, name) if isinstance(name, str) else name, "content": value}
    if name == "function_call":
        calls = _json(value, "function_call")
        message |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return message


def _alpaca(fields: Mapping[str, Any]) -> Raw:
    items: list[object] = []
    for index, pair in enumerate(_list(fields.get("history") or [], "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRowError("not a message", f"history[{index}] is not a pair of question and answer")
        items += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = _string(fields["instruction"], "instruction")
    if fields.get("input"):
        question = (
            f"{question}\n\n{_string(fields['input'], 'input')}" if question else _string(fields["input"], "input")
        )
    items += [{"role": "user", "content": question}, {"role": "assistant", "content": fields["output"]}]
    return _with_system(fields, items), fields.get("tools")


def _prompt_completion(fields: Mapping[str, Any]) -> Raw:
    items: list[object] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = fields.get(key)
        if isinstance(value, list):
            items += value
        elif key == "prompt" or value is not None:
            items.append({"role": role, "content": _string(value, key)})
    return items, fields.get("tools")


_READERS: Final[dict[str, Callable[[Mapping[str, Any]], Raw]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}


def _with_system(fields: Mapping[str, Any], items: list[object]) -> list[object]:
    return [{"role": "system", "content": fields["system"]}, *items] if fields.get("system") else items


def _tokens(fields: Mapping[str, Any]) -> Encoded:
    ids, labels = (_list(fields[key], key) for key in ("input_ids", "labels"))
    tokens = [token for token in ids if type(token) is int and 0 <= token < 2**31]
    if len(tokens) != len(ids) or len(ids) != len(labels):
        raise BadRowError("not tokens", "'input_ids' and 'labels' are lists of token ids of one length")
    if any(label not in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True)):
        raise BadRowError(
            "labels differ from input_ids", f"a label is its own token, not the next one, or {IGNORE_INDEX}"
        )
    spans, position = [], 0
    for trained, run in groupby(labels, key=lambda label: label != IGNORE_INDEX):
        end = position + len(list(run))
        if trained:
            spans.append((position, end))
        position = end
    return Encoded(tokens, spans)


def _list(value: object, key: str) -> list[object]:
    value = _json(value, key) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise BadRowError("no list", f"'{key}' is {kind_of(value)}; give a list")
    return value


def _string(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise BadRowError("content is not text", f"'{key}' is {kind_of(value)}; give a string")
    return check_text(value, key)


def _json(value: object, key: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRowError("not JSON", f"'{key}' holds a text that is no JSON ({error})") from None


def _found(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, fields)) or "nothing"
