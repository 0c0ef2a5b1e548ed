"""Tables with one message a row, as support exports have them, become rows of one conversation.

With the options of such a table, every row must be a message. The other columns of its row are keys of the message.
``system``, ``tools`` and what ``data.columns`` maps belong to the conversation, and have to be the same in all of its
messages.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import date, datetime
from decimal import Decimal
from math import isfinite
from shlex import quote
from typing import Any, Final, NamedTuple
from uuid import UUID

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.conversation import BadRowError, kind_of
from phi3_lightning.data.keys import ID
from phi3_lightning.data.message_fields import ROLES
from phi3_lightning.data.readers import Row, decode_line
from phi3_lightning.data.sources import Source
from phi3_lightning.errors import DataError

_NO_VALUE: Final = {"", "nan", "none", "null", "<na>", "nat", "na", "n/a", "#n/a", "undefined"}  # in lower case
_ROUNDED: Final = re.compile(r"\d[.,]\d+E\+\d+", re.IGNORECASE)  # how spreadsheets write long numbers
_LISTED_SPEAKERS: Final = 6
_EXACT: Final = 2**53  # floats below hold each whole number

SortKey = tuple[str, int | float | Decimal | datetime]
"""The kind of a value to sort by, and the value."""


class _Message(NamedTuple):
    row: int
    fields: dict[str, Any]


def source_rows(source: Source, options: RowOptions) -> Iterator[Row]:
    """Return the rows of a source; of a table with one message a row, one row for each conversation.

    Raises:
        DataError: If the source cannot be read, or is not such a table.
    """
    rows = source.rows()
    return rows if options.conversation_column is None else group_messages(rows, options, source.name())


def group_messages(rows: Iterable[Row], options: RowOptions, name: str) -> Iterator[Row]:
    """Group the messages of each conversation, wherever in the table they are.

    The messages of one source, called ``name`` in errors, are held in memory. Equal conversation ids in two sources are
    two conversations.

    Yields:
        The number of each row that belongs to no conversation, with its error; then the number of each conversation's
        first row, with its ``messages`` or its error, in the order in which conversations begin.

    Raises:
        DataError: If a column that the options name is missing, or its values cannot be sorted.
    """
    table = _Table(options, name)
    bad_rows: list[Row] = []
    for number, row in rows:
        try:
            table.add(number, decode_line(row) if isinstance(row, bytes) else row)
        except BadRowError as error:
            bad_rows.append((number, error))
    table.check()
    yield from bad_rows
    yield from table.conversations()


class _Table:
    """The messages of a table, by conversation."""

    def __init__(self, options: RowOptions, name: str) -> None:
        names = ("conversation_column", "role_column", "content_column", "order_column")
        self._by_option = {option: getattr(options, option) for option in names}
        self._id, self._role, self._content, self._order = self._by_option.values()
        self._name = name
        self._role_map = options.role_map or {}
        self._aliases = options.columns or {}
        self._shared = {"system", "tools", options.group_by, *self._aliases.values()}
        self._columns: dict[str, Any] = {}  # an ordered set
        self._chats: dict[object, list[_Message]] = {}

    def add(self, number: int, fields: object) -> None:
        if not isinstance(fields, dict):
            raise BadRowError("not an object", f"a table's row is an object with columns, not {kind_of(fields)}")
        self._columns.update(fields)
        key = fields.get(self._id)
        if type(key) is not str or key not in self._chats:
            key = _conversation_id(key, self._id)
        self._chats.setdefault(key, []).append(_Message(number, fields))

    def check(self) -> None:
        """Check the table as a whole, once all its rows are read."""
        aliases = {f"columns.{name}": column for name, column in self._aliases.items()}
        for option, column in (self._by_option | aliases).items():
            if column is not None and self._columns and column not in self._columns:
                known = ", ".join(map(repr, self._columns))
                raise DataError(f"{self._name}: data.{option} names {column!r}, and the table's columns are {known}")
        if self._order is not None and self._chats:
            orders = [message.fields.get(self._order) for messages in self._chats.values() for message in messages]
            if all(_sort_key(order) is None for order in orders):
                raise DataError(f"{self._name}: {_no_order(orders, self._order)}")
        self._check_roles()

    def _check_roles(self) -> None:
        """Refuse a table of which no speaker has a known role, with a mapping to begin with."""
        speakers = Counter(
            str(message.fields.get(self._role)) for messages in self._chats.values() for message in messages
        )
        if not speakers or any(speaker in ROLES or speaker in self._role_map for speaker in speakers):
            return
        first = Counter(str(messages[0].fields.get(self._role)) for messages in self._chats.values())
        asks = first.most_common(1)[0][0]
        names = [name for name, _ in speakers.most_common(_LISTED_SPEAKERS)]
        guess = {asks: "user"} | {name: "assistant" for name in names if name != asks}
        counts = ", ".join(f"{name!r} ({speakers[name]:,})" for name in names)
        option = quote(json.dumps(guess, ensure_ascii=False))
        raise DataError(
            f"{self._name}: {self._role!r} (data.role_column) has none of the roles {', '.join(ROLES)}, but {counts}; "
            f"say which of them asks and which answers, as in --data.role_map {option}"
        )

    def conversations(self) -> Iterator[Row]:
        for key, messages in self._chats.items():
            try:
                yield messages[0].row, {ID: key, **self._chat(messages)}
            except BadRowError as error:
                yield messages[0].row, BadRowError(error.reason, f"conversation {key!r}: {error.detail}")

    def _chat(self, messages: list[_Message]) -> dict[str, Any]:
        turns: list[dict[str, Any]] = []
        row: dict[str, Any] = {"messages": turns} | dict.fromkeys(self._aliases.values())
        others = [column for column in self._columns if column not in self._by_option.values()]
        for number, fields in messages if self._order is None else _sorted(messages, self._order):
            role = fields.get(self._role)
            if _missing(role):
                raise BadRowError("no role", f"row {number} has nothing in {self._role!r} (data.role_column)")
            turn = {"role": role}
            if self._content in fields:
                turn["content"] = fields[self._content]
            for column in others:
                value = fields.get(column)
                if _missing(value):
                    continue
                if column in ("role", "content"):  # the options name other columns for these
                    row[column] = value
                elif column not in self._shared:
                    turn[column] = value
                elif row.get(column) is None:
                    row[column] = value
                elif row[column] != value:
                    fault = f"column {column!r} is {row[column]!r} and {value!r}; it is for the whole conversation"
                    raise BadRowError("columns differ", fault)
            turns.append(turn)
        return row


def _conversation_id(value: object, column: str) -> object:
    """The id of a row's conversation; rows without one never share a conversation."""
    if isinstance(value, float | Decimal) and isfinite(value) and value == int(value) and -_EXACT < value < _EXACT:
        return int(value)  # pandas writes the whole numbers of a column with gaps as floats
    known = isinstance(value, str | int | UUID | bytes) and not isinstance(value, bool) and value != b""
    if not known or (isinstance(value, str) and value.strip().lower() in _NO_VALUE):
        fault = f"{column!r} (data.conversation_column) is {value!r}; give every conversation an id of its own"
        raise BadRowError("no conversation id", fault)
    if isinstance(value, str) and _ROUNDED.fullmatch(value.strip()):
        fault = f"{column!r} (data.conversation_column) is {value!r}, rounded by a spreadsheet; export ids as text"
        raise BadRowError("no conversation id", fault)
    return value


def _missing(value: object) -> bool:
    """Whether a cell is empty: null, an empty text of CSV, or the NaN of pandas."""
    return value is None or value == "" or value != value


def _sorted(messages: list[_Message], column: str) -> list[_Message]:
    """Messages sorted by a column; equal ones stay as they are in the file."""
    orders = [message.fields.get(column) for message in messages]
    keys = [key for order in orders if (key := _sort_key(order)) is not None]
    if len(keys) < len(orders) or len({kind for kind, _ in keys}) > 1:
        raise BadRowError("no order", _no_order(orders, column))
    values: list[Any] = [value for _, value in keys]  # of one kind, so they compare
    return [messages[index] for index in sorted(range(len(messages)), key=values.__getitem__)]


def _sort_key(order: object) -> SortKey | None:
    """Read a number or a time, or the text of one; None for anything else."""
    if isinstance(order, str):
        text = order.strip()
        text = f"{text[:-4]}+00:00" if text.endswith(" UTC") else text  # as SQL databases write it
        for parse in (int, float, datetime.fromisoformat) if text[4:5] != "-" else (datetime.fromisoformat, float):
            try:
                return _sort_key(parse(text))
            except ValueError:
                continue
        return None
    if isinstance(order, date) and order == order:  # not the NaT of pandas
        time = order if isinstance(order, datetime) else datetime.combine(order, datetime.min.time())
        return ("time" if time.tzinfo is None else "time with a zone"), time
    if isinstance(order, int | float | Decimal) and not isinstance(order, bool):
        return ("number", order) if isinstance(order, int) or isfinite(order) else None
    return None


def _no_order(orders: list[object], column: str) -> str:
    kinds = [key and key[0] for key in map(_sort_key, orders)]
    other = next((order for order, kind in zip(orders, kinds, strict=True) if kind != kinds[0]), orders[-1])
    return (
        f"{column!r} (data.order_column) is {orders[0]!r} and {other!r}; give only numbers, or only times in ISO "
        "8601 such as 2024-09-02T09:05, all with a zone or all without. In pandas: "
        f"df[{column!r}] = pandas.to_datetime(df[{column!r}]).map(pandas.Timestamp.isoformat). "
        "If the file is in order, leave out data.order_column"
    )
