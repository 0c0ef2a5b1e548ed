"""Accounts for every field of a row: it is used, or counted as unused, or it makes the row a bad one."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from phi3_lightning.config.data import FIELDS, FORMATS, MASKS, SYSTEM, TOOLS
from phi3_lightning.data.conversation import BadRowError, kind_of
from phi3_lightning.data.decoding import decode_json

# The first that fits wins; a row with an answer goes before one without.
_FORMATS_BY_PRIORITY: Final = (
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
_MAX_LISTED: Final = 20  # fields in one line of the log


def is_absent(value: object) -> bool:
    """Whether a field is null or empty, as the cells of tables often are; 0 and false are values."""
    return value is None or value == "[]" or (not value and not isinstance(value, int | float))


def recognise(fields: Mapping[str, Any], expected: str) -> str | None:
    """Return the format of a row, ``expected`` unless that is ``auto``; None if the row lacks the format's fields."""
    candidates = [(name, keys) for name, keys in _FORMATS_BY_PRIORITY if expected in ("auto", name)]
    filled = (name for name, keys in candidates if all(_filled(fields, key) for key in keys))
    present = (name for name, keys in candidates if all(key in fields for key in keys))
    return next(filled, None) or next(present, None)


def _filled(fields: Mapping[str, Any], key: str) -> bool:
    if key not in fields:
        return False
    return not is_absent(fields[key]) or (key == "instruction" and not is_absent(fields.get("input")))


def rename(fields: Mapping[str, Any], names: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Rename fields, by the old name of each new one; return them, and the names of those that others replaced."""
    old = set(names.values())
    others = {key: value for key, value in fields.items() if key not in old}
    displaced = [key for key, value in others.items() if key in names and not is_absent(value)]
    return others | {name: fields[key] for name, key in names.items() if key in fields}, displaced


def read_alias(fields: Mapping[str, Any], names: Sequence[str], where: str = "the row") -> Any:
    """Return the value of a field that goes by several names; None if it is absent.

    Raises:
        BadRowError: If two of the names have different values.
    """
    filled = [name for name in names if name in fields and not is_absent(fields[name])]
    if any(fields[name] != fields[filled[0]] for name in filled[1:]):
        both = " and ".join(map(repr, filled))
        raise BadRowError("two fields for one thing", f"{both} of {where} differ; keep one of them")
    return fields[filled[0]] if filled else None


def read_list(value: object, where: str) -> list[Any]:
    """Return a list, which CSV holds as JSON.

    Raises:
        BadRowError: If it is not a list.
    """
    if isinstance(value, str):
        value = decode_json(value, f"'{where}'")
    if not isinstance(value, list):
        raise BadRowError("not a list", f"'{where}' is {kind_of(value)}; give a list")
    return value


def check_weight(fields: Mapping[str, Any]) -> None:
    """Check that a row counts like any other.

    Raises:
        BadRowError: If it has a ``weight`` other than 1.
    """
    weight = fields.get("weight")
    if not is_absent(weight) and weight not in (1, "1", "1.0"):
        raise BadRowError(
            "weight is not 1",
            f"the row has weight {weight!r}, but all rows count alike; remove the row, or mix files with data.mixture",
        )


def unused_fields(fields: Mapping[str, Any], name: str, columns: Mapping[str, str] | None) -> list[str]:
    """Return the fields that a row's format does not read: identifiers, labels, and other renderings of the row.

    Raises:
        BadRowError: If a part of the conversation would be lost, or a column that the user named.
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
    unreadable = next((key for key in rest if key in _MEDIA), None) or _unreadable_content(fields, rest, name)
    if unreadable is not None:
        raise BadRowError("a field would be lost", f"'{unreadable}' {_remedy(unreadable, name)}")
    return rest


def _unreadable_content(fields: Mapping[str, Any], rest: list[str], name: str) -> str | None:
    """The first field that belongs to the conversation, and not to another rendering of it beside this one."""
    content = [key for key in rest if key in _CONTENT]
    if not content:
        return None
    others = [other for other, keys in FORMATS.items() if other != name and all(_filled(fields, key) for key in keys)]
    return next((key for key in content if not any(key in FIELDS[other] for other in others)), None)


def _remedy(field: str, name: str) -> str:
    if field in _MEDIA:
        return "cannot be used by a model that reads text only; remove the row or the field"
    if field in SYSTEM or field in TOOLS:
        return (
            f"has no place in a row of format '{name}', which is trained as it stands; remove it, or give "
            "the row as messages"
        )
    return (
        f"has no place in a row of format '{name}', but in one of format 'alpaca': name its columns with "
        "data.columns: {instruction: ..., output: ...}"
    )


def name_unused(unused: Mapping[str, int]) -> str:
    """List unused fields with their numbers of rows, the most frequent first; an empty text if there are none."""
    ranked = sorted(unused.items(), key=lambda item: (-item[1], item[0]))
    counts = [f"{name} ({count})" for name, count in ranked[:_MAX_LISTED]]
    if ranked:
        name, count = ranked[0]
        counts[0] = f"{name} ({count} {'row' if count == 1 else 'rows'})"
    return ", ".join(counts) + (f" and {len(ranked) - _MAX_LISTED} more" if len(ranked) > _MAX_LISTED else "")
