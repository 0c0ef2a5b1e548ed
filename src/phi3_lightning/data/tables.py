"""Tables of one message a row, as support exports have them, become rows of one conversation.

With the options of such a table no row is read in any other way: one that is no message is a bad row. A message has its
row's other columns as keys. ``system``, ``tools`` and what ``data.columns`` maps are the conversation's, and have to be
the same in all of its messages.
"""

import re
from collections.abc import Iterable, Iterator
from datetime import date, datetime
from decimal import Decimal
from math import isfinite
from typing import Any, Final, NamedTuple
from uuid import UUID

from phi3_lightning.config.data import RowOptions
from phi3_lightning.data.conversation import BadRowError, kind_of
from phi3_lightning.data.keys import ID
from phi3_lightning.data.readers import Row, decode_line
from phi3_lightning.data.sources import Source
from phi3_lightning.errors import DataError

_NO_VALUE: Final = {"", "nan", "none", "null", "<na>", "nat", "na", "n/a", "#n/a", "undefined"}  # in small letters
_ROUNDED: Final = re.compile(r"\d[.,]\d+E\+\d+", re.IGNORECASE)  # what spreadsheets make of long numbers
_EXACT: Final = 2**53  # each whole number below has a float of its own

Rank = tuple[str, int | float | Decimal | datetime]
"""The kind of an order, and the order."""


class _Message(NamedTuple):
    number: int
    fields: dict[str, Any]


def source_rows(source: Source, options: RowOptions) -> Iterator[Row]:
    """Read a source as the options say: as it is, or as a table of one message a row.

    Args:
        source: Where the rows are.
        options: What the rows hold.

    Returns:
        The rows.

    Raises:
        DataError: The source cannot be read, or is no such table.
    """
    return (
        source.rows() if options.conversation_column is None else group_messages(source.rows(), options, source.name())
    )


def group_messages(rows: Iterable[Row], options: RowOptions, name: str) -> Iterator[Row]:
    """Gather the messages of each conversation, wherever in the table they are.

    The messages of one source are held in memory. Equal conversation ids in two sources are two conversations.

    Args:
        rows: One message each.
        options: Which columns hold conversation, role, content and order.
        name: The name of the source.

    Yields:
        The number of each row that belongs to no conversation, with its fault; then the number of each conversation's
        first row, with its ``messages`` or its fault, in the order in which conversations begin.

    Raises:
        DataError: A column that the options name is not there, or its values give no order.
    """
    table = _Table(options, name)
    faults: list[Row] = []
    for number, row in rows:
        try:
            table.add(number, decode_line(row) if isinstance(row, bytes) else row)
        except BadRowError as error:
            faults.append((number, error))
    table.check()
    yield from faults
    yield from table.rows()


class _Table:
    """The messages of a table, by conversation."""

    def __init__(self, options: RowOptions, name: str) -> None:
        named = (options.conversation_column, options.role_column, options.content_column)
        self._id, self._role, self._content = (column or "" for column in named)
        self._order = options.order_column
        self._name = name
        self._mapped = {*named, options.order_column}
        self._renamed = options.columns or {}
        self._shared = {"system", "tools", *self._renamed.values()} | (
            {options.group_by} if options.group_by else set()
        )
        self._columns: dict[str, Any] = {}  # a set in order
        self._chats: dict[object, list[_Message]] = {}

    def add(self, number: int, fields: object) -> None:
        if not isinstance(fields, dict):
            raise BadRowError("not an object", f"a table's row is an object with columns, not {kind_of(fields)}")
        self._columns.update(fields)
        key = fields.get(self._id)
        if type(key) is not str or key not in self._chats:
            key = _conversation(key, self._id)
        self._chats.setdefault(key, []).append(_Message(number, fields))

    def check(self) -> None:
        """Name what is wrong with all rows once."""
        options = {
            "conversation_column": self._id,
            "role_column": self._role,
            "content_column": self._content,
            "order_column": self._order,
        }
        renamed = {f"columns.{name}": column for name, column in self._renamed.items()}
        for option, column in (options | renamed).items():
            if column is not None and self._columns and column not in self._columns:
                known = ", ".join(map(repr, self._columns))
                raise DataError(f"{self._name}: data.{option} names {column!r}, and the table's columns are {known}.")
        if self._order is not None and self._chats:
            orders = [message.fields.get(self._order) for messages in self._chats.values() for message in messages]
            if all(_rank(order) is None for order in orders):
                raise DataError(f"{self._name}: {_no_order(orders, self._order)}.")

    def rows(self) -> Iterator[Row]:
        for key, messages in self._chats.items():
            try:
                yield messages[0].number, {ID: key, **self._chat(messages)}
            except BadRowError as error:
                yield messages[0].number, BadRowError(error.reason, f"conversation {key!r}: {error.detail}")

    def _chat(self, messages: list[_Message]) -> dict[str, Any]:
        turns: list[dict[str, Any]] = []
        row: dict[str, Any] = {"messages": turns} | dict.fromkeys(self._renamed.values())
        others = [column for column in self._columns if column not in self._mapped]
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
                if column in ("role", "content"):  # but not those of the options
                    row[column] = value
                elif column not in self._shared:
                    turn[column] = value
                elif row.get(column) is None:
                    row[column] = value
                elif row[column] != value:
                    fault = f"column {column!r} is {row[column]!r} and {value!r}; it is the whole conversation's"
                    raise BadRowError("columns differ", fault)
            turns.append(turn)
        return row


def _conversation(value: object, column: str) -> object:
    """The id of a row's conversation; rows without one are strangers to each other."""
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
    """Messages by their order; those of equal order as they are in the file."""
    orders = [message.fields.get(column) for message in messages]
    ranks = [rank for order in orders if (rank := _rank(order)) is not None]
    if len(ranks) < len(orders) or len({kind for kind, _ in ranks}) > 1:
        raise BadRowError("no order", _no_order(orders, column))
    places: list[Any] = [place for _, place in ranks]  # of one kind, which compare
    return [messages[index] for index in sorted(range(len(messages)), key=places.__getitem__)]


def _rank(order: object) -> Rank | None:
    """Read an order: a number or a time, or the text of one; None of anything else."""
    if isinstance(order, str):
        text = order.strip()
        text = f"{text[:-4]}+00:00" if text.endswith(" UTC") else text  # as SQL databases write it
        for parse in (int, float, datetime.fromisoformat) if text[4:5] != "-" else (datetime.fromisoformat, float):
            try:
                return _rank(parse(text))
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
    kinds = [rank and rank[0] for rank in map(_rank, orders)]
    other = next((order for order, kind in zip(orders, kinds, strict=True) if kind != kinds[0]), orders[-1])
    return (
        f"{column!r} (data.order_column) is {orders[0]!r} and {other!r}; an order is all numbers, or all times in ISO "
        "8601 such as 2024-09-02T09:05, with a zone or without. In pandas: "
        f"df[{column!r}] = pandas.to_datetime(df[{column!r}]).map(pandas.Timestamp.isoformat). "
        "Where the file is in order, leave data.order_column out"
    )
