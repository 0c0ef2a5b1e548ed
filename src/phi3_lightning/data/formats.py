"""A row of any known format becomes a conversation, a preference, a text, or tokens; or a bad row, with the reason."""

import re
from collections import Counter
from collections.abc import Mapping
from shlex import quote
from typing import Any

from phi3_lightning.config.data import FORMATS, RowOptions
from phi3_lightning.data.conversation import (
    BadRowError,
    Conversation,
    LabelledConversation,
    PlainText,
    PreferencePair,
    TokenizedDocument,
    kind_of,
)
from phi3_lightning.data.fields import check_weight, is_labelled, recognise, rename, unused_fields
from phi3_lightning.data.items import read_chat, read_string
from phi3_lightning.data.keys import key_columns
from phi3_lightning.data.messages import Turn
from phi3_lightning.data.preferences import read_label, read_pair, trained_answer
from phi3_lightning.data.tokens import read_tokens
from phi3_lightning.data.turns import prompt_turns, training_turns

ParsedRow = Conversation | PreferencePair | LabelledConversation | PlainText | TokenizedDocument


def parse_row(row: object, options: RowOptions, unused: Counter[str] | None = None) -> ParsedRow:
    """Read a row for training; ``unused`` counts rows by the fields that nothing reads.

    Raises:
        BadRowError: If the row has no known format, or cannot be trained.
    """
    fields, name, unread = _open(row, options)
    check_weight(fields)
    parsed: ParsedRow
    if name == "text":
        parsed = PlainText(read_string(fields["text"], "text"))
    elif name == "tokens":
        parsed = read_tokens(fields)
    elif name == "preference":
        parsed = read_pair(fields, options, unread)
    else:
        turns = read_chat(fields, name, options, unread)
        _check_answer(fields, name, turns)
        parsed = training_turns(turns, options)
        if is_labelled(fields, name, options.format):
            parsed = LabelledConversation(trained_answer(parsed, turns, options), read_label(fields))
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
    if name == "preference":
        prompt = read_pair(fields, options, unread).prompt
    else:
        prompt = prompt_turns(read_chat(fields, name, options, unread), options)
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
    unused = unused_fields(row, name, columns, labelled=is_labelled(row, name, options.format))
    return row, name, {*displaced, *unused} - key_columns(options)


def _unknown_format(fields: Mapping[str, Any], options: RowOptions) -> BadRowError:
    expected = "messages" if options.format == "auto" else options.format
    return BadRowError(
        "unknown format",
        f"found {_names(fields)}; expected {' and '.join(map(repr, FORMATS[expected]))}"
        + (f" or another of the formats {', '.join(FORMATS)}" if options.format == "auto" else "")
        + f"; name other columns with data.columns{suggest_table(list(fields))}",
    )


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
        "order_column": ("order", "time", "date", "created", r"sent\b", "index", "turn", "position"),
    }
    guess: dict[str, str] = {}
    for option, words in hints.items():
        others = {column: re.sub(r"[\W_]+", " ", column.lower()) for column in columns if column not in guess.values()}
        matches = (column for word in words for column, name in others.items() if re.search(rf"\b{word}", name))
        if column := next(matches, None):
            guess[option] = column
    if not {"conversation_column", "role_column", "content_column"} <= guess.keys():
        return ""
    options = [f"--data.{option} {quote(column)}" for option, column in guess.items()]
    return f"; one message a row? Try {' '.join(options)}"


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, fields)) or "nothing"
