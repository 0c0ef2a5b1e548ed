"""The ledger of a row's fields: each is used, counted as unused, or would be lost, which makes the row a bad one."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from phi3_lightning.config.data import FIELDS, FORMATS, MASKS, SYSTEM, TOOLS
from phi3_lightning.data.conversation import BadRowError, kind_of
from phi3_lightning.data.decoding import decode_json

# Where several fit, the first is meant; a row with an answer goes before one without.
_SHAPES: Final = (
    *((name, FORMATS[name]) for name in ("messages", "sharegpt", "alpaca", "prompt_completion")),
    ("alpaca", ("instruction",)),
    ("prompt_completion", ("prompt",)),
    ("tokens", FORMATS["tokens"]),
    *(("tokens", ("input_ids", mask)) for mask in MASKS),
    ("text", FORMATS["text"]),
    ("tokens", ("input_ids",)),
)
_CONTENT: Final = frozenset((*SYSTEM, *TOOLS)) | {"input", "history"}
_MEDIA: Final = frozenset({"images", "videos", "audios"})
_NAMED: Final = 20  # fields that a line of the log names


def is_absent(value: object) -> bool:
    """Whether a field says nothing. Tables have every column in every row.

    Args:
        value: Its value.

    Returns:
        Whether it is null or empty; 0 and false say something.
    """
    return value is None or value == "[]" or (not value and not isinstance(value, int | float))


def recognise(fields: Mapping[str, Any], wanted: str) -> str | None:
    """Say which format a row has.

    Args:
        fields: The row.
        wanted: A format, or ``auto``.

    Returns:
        The format; None where the row lacks its fields.
    """
    shapes = [(name, keys) for name, keys in _SHAPES if wanted in ("auto", name)]
    filled = (name for name, keys in shapes if all(_filled(fields, key) for key in keys))
    named = (name for name, keys in shapes if all(key in fields for key in keys))
    return next(filled, None) or next(named, None)


def _filled(fields: Mapping[str, Any], key: str) -> bool:
    if key not in fields:
        return False
    return not is_absent(fields[key]) or (key == "instruction" and not is_absent(fields.get("input")))


def rename(fields: Mapping[str, Any], names: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Give fields the names that are read here.

    Args:
        fields: A row or a message.
        names: For each new name the old one; fields that lack it are left without.

    Returns:
        The fields under their new names, and those whose own names were taken from them.
    """
    old = set(names.values())
    others = {key: value for key, value in fields.items() if key not in old}
    displaced = [key for key, value in others.items() if key in names and not is_absent(value)]
    return others | {name: fields[key] for name, key in names.items() if key in fields}, displaced


def only(fields: Mapping[str, Any], names: Sequence[str], where: str = "the row") -> Any:
    """Read a field that has several names.

    Args:
        fields: A row or a message.
        names: The names that mean the same.
        where: Its place in the row.

    Returns:
        Its value; None where it is absent.

    Raises:
        BadRowError: Two of them have different values.
    """
    filled = [name for name in names if name in fields and not is_absent(fields[name])]
    if any(fields[name] != fields[filled[0]] for name in filled[1:]):
        both = " and ".join(map(repr, filled))
        raise BadRowError("two fields for one thing", f"{both} of {where} differ; keep one of them")
    return fields[filled[0]] if filled else None


def read_list(value: object, where: str) -> list[Any]:
    """Read a list, or its JSON, as CSV has it.

    Args:
        value: A field's value.
        where: The field.

    Returns:
        The list.

    Raises:
        BadRowError: It is something else.
    """
    if isinstance(value, str):
        value = decode_json(value, f"'{where}'")
    if not isinstance(value, list):
        raise BadRowError("no list", f"'{where}' is {kind_of(value)}; give a list")
    return value


def check_weight(fields: Mapping[str, Any]) -> None:
    """See that a row counts like any other.

    Args:
        fields: The row.

    Raises:
        BadRowError: It has another ``weight`` than 1.
    """
    weight = fields.get("weight")
    if not is_absent(weight) and weight not in (1, "1", "1.0"):
        raise BadRowError(
            "weight is not 1",
            f"the row has weight {weight!r}, and rows count alike; leave the row out, or mix files with data.mixture",
        )


def unused_fields(fields: Mapping[str, Any], name: str, columns: Mapping[str, str] | None) -> list[str]:
    """Account for the fields that a row's format does not read.

    Args:
        fields: The row, its fields under the names of its format.
        name: The format.
        columns: ``data.columns``.

    Returns:
        The fields that nothing reads and nobody will miss: identifiers, labels, and other renderings of the row.

    Raises:
        BadRowError: A part of the conversation would be lost, or a column that the user named.
    """
    used = FIELDS[name]
    for key, column in (columns or {}).items():
        if key not in used:
            raise BadRowError(
                "column is not used",
                f"data.columns names {column!r} for '{key}', which a row of format '{name}' does not have; "
                "leave it out of data.columns, or name the format with data.format",
            )
    if used.issuperset(fields):
        return []
    rest = [key for key, value in fields.items() if key not in used and key != "weight" and not is_absent(value)]
    lost = next((key for key in rest if key in _MEDIA), None) or _lost(fields, rest, name)
    if lost is not None:
        raise BadRowError("a field would be lost", f"'{lost}' {_remedy(lost, name)}")
    return rest


def _lost(fields: Mapping[str, Any], rest: list[str], name: str) -> str | None:
    """The first field that belongs to the conversation, and not to another rendering of it beside this one."""
    content = [key for key in rest if key in _CONTENT]
    if not content:
        return None
    others = [other for other, keys in FORMATS.items() if other != name and all(_filled(fields, key) for key in keys)]
    return next((key for key in content if not any(key in FIELDS[other] for other in others)), None)


def _remedy(field: str, name: str) -> str:
    if field in _MEDIA:
        return "cannot be used by a model that reads text alone; leave out the row or the field"
    if field in SYSTEM or field in TOOLS:
        return (
            f"has no place in a row of format '{name}', which is trained as it stands; leave it out, or give "
            "the row as messages"
        )
    return (
        f"has no place in a row of format '{name}', but in one of format 'alpaca': name its columns with "
        "data.columns: {instruction: ..., output: ...}"
    )


def name_unused(unused: Mapping[str, int]) -> str:
    """Name the fields that nothing reads, for the log.

    Args:
        unused: Rows with each of them.

    Returns:
        Each with its rows, the most frequent first; an empty text where there are none.
    """
    ranked = sorted(unused.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{name} ({count})" for name, count in ranked[:_NAMED]]
    if named:
        name, count = ranked[0]
        named[0] = f"{name} ({count} {'row' if count == 1 else 'rows'})"
    return ", ".join(named) + (f" and {len(ranked) - _NAMED} more" if len(ranked) > _NAMED else "")
