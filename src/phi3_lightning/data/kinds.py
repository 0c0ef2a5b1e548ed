"""Whether the rows of training, validation and test data are of one kind, before they are tokenised."""

from collections.abc import Mapping

from phi3_lightning.config.data import DataConfig, Split
from phi3_lightning.data.conversation import KIND_NAMES, BadRowError, Kind, LabelledConversation, PreferencePair
from phi3_lightning.data.formats import parse_row
from phi3_lightning.data.readers import decode_line
from phi3_lightning.data.sources import HubSource, find_sources
from phi3_lightning.data.tables import source_rows
from phi3_lightning.errors import ConfigError

FirstRow = tuple[Kind, str]
"""Kind and place of the first row that can be used."""


def first_row(options: DataConfig, split: Split) -> FirstRow | None:
    """Return the first row of a split, untokenised.

    Returns:
        None of a hub data set, which is downloaded later, of a table of messages, whose rows are chats, and of no row.

    Raises:
        DataError: If a file cannot be read.
    """
    row_options = options.row_options()
    if row_options.conversation_column is not None:
        return None
    for source in find_sources(options.files(split) or [], split):
        if isinstance(source, HubSource):
            return None
        for number, row in source_rows(source, row_options):
            if isinstance(row, BadRowError):
                continue
            try:
                parsed = parse_row(decode_line(row) if isinstance(row, bytes) else row, row_options)
            except BadRowError:
                continue
            if isinstance(parsed, PreferencePair):
                return "pair", source.place(number)
            return "labelled" if isinstance(parsed, LabelledConversation) else "chat", source.place(number)
    return None


def check_one_kind(rows: Mapping[Split, FirstRow]) -> None:
    """Refuse splits whose rows are of two kinds; a model learns from one.

    Raises:
        ConfigError: It names two such splits, with a row of each.
    """
    for split, (kind, place) in rows.items():
        first, (first_kind, first_place) = next(iter(rows.items()))
        if kind != first_kind:
            one, other = f"{place} is {KIND_NAMES[kind]}", f"{first_place} in data.{first} is {KIND_NAMES[first_kind]}"
            raise ConfigError(
                f"data.{split}: {one}, and {other}; what is trained and what measures it are of one kind: give other "
                "files, or name the format of all rows with data.format"
            )
