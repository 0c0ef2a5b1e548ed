"""Tables of one message a row, as support exports have them, become rows of one conversation."""

from collections.abc import Iterable, Iterator

from phi3_lightning.data.conversation import BadRowError
from phi3_lightning.data.options import RowOptions
from phi3_lightning.data.readers import Row, decode_line


def gather(rows: Iterable[Row], options: RowOptions) -> Iterator[Row]:
    """Gather the messages of each conversation, wherever in the table they are.

    The messages of one source are held in memory.

    Args:
        rows: One message each.
        options: Which columns hold conversation, role, content and order.

    Yields:
        The number of a conversation's first row, and its ``messages``, in the order in which conversations begin;
        a row that is no message as it is.
    """
    chats: dict[object, list[tuple[int, dict[str, object]]]] = {}
    for number, row in rows:
        try:
            fields = decode_line(row) if isinstance(row, bytes) else row
        except BadRowError:
            fields = None
        if isinstance(fields, dict) and isinstance(key := fields.get(options.conversation_id), str | int):
            chats.setdefault(key, []).append((number, fields))
        else:
            yield number, row
    for messages in chats.values():
        ordered = messages if options.order is None else sorted(messages, key=lambda item: _rank(item[1], options))
        yield (
            messages[0][0],
            {
                "messages": [
                    {"role": fields.get(options.role or ""), "content": fields.get(options.content or "")}
                    for _, fields in ordered
                ]
            },
        )


def _rank(fields: dict[str, object], options: RowOptions) -> tuple[bool, float, str]:
    """Numbers by value, before anything else by text, in which ISO dates sort by time."""
    value = fields.get(options.order or "")
    try:
        return False, float(str(value)), ""
    except ValueError:
        return True, 0.0, str(value)
