"""Accounts for every field of a row: it is used, or counted as unused, or it makes the row a bad one."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from phi3_lightning.config.data import CHAT_FORMATS, FIELDS, FORMATS, MASKS, SYSTEM, TOOLS
from phi3_lightning.data.conversation import BadRowError, kind_of
from phi3_lightning.data.decoding import decode_json

# The first that fits wins; a row with an answer goes before one without.
_FORMATS_BY_PRIORITY: Final = (
    *((name, FORMATS[name]) for name in CHAT_FORMATS),
    ("alpaca", ("instruction",)),
    ("prompt_completion", ("prompt",)),
    ("tokens", FORMATS["tokens"]),
    *(("tokens", ("input_ids", mask)) for mask in MASKS),
    ("text", FORMATS["text"]),
    ("tokens", ("input_ids",)),
)
_PROMPT_FIELDS: Final = {  # may hold the prompt of a pair; the first that is filled does
    "prompt": "prompt_completion",
    "messages": "messages",
    "conversations": "sharegpt",
    "instruction": "alpaca",
}
_CONTENT: Final = frozenset((*SYSTEM, *TOOLS)) | {"input", "history"}
_MEDIA: Final = frozenset({"images", "videos", "audios"})
_MAX_LISTED: Final = 20  # fields in one line of the log


def is_absent(value: object) -> bool:
    """Whether a field is null or empty, as the cells of tables often are; 0 and false are values."""
    return value is None or value == "[]" or (not value and not isinstance(value, int | float))


def recognise(fields: Mapping[str, Any], expected: str) -> str | None:
    """Return the format of a row, for ``kto`` that of its chat; None if it lacks the fields of the ``expected`` one."""
    if _is_pair(fields, expected):
        return "preference"
    names = {"auto": [name for name, _ in _FORMATS_BY_PRIORITY], "kto": CHAT_FORMATS}
    return _first_format(fields, names.get(expected, [expected]))


def _is_pair(fields: Mapping[str, Any], expected: str) -> bool:
    """Whether both sides of a pair are there and, beside other formats in a table, one of them is filled."""
    sides = FORMATS["preference"]
    if expected not in ("auto", "preference") or not all(side in fields for side in sides):
        return False
    return expected == "preference" or any(_filled(fields, side) for side in sides)


def is_labelled(fields: Mapping[str, Any], name: str, expected: str) -> bool:
    """Whether a row of format ``name`` has an answer with a label: true or false, unless ``kto`` is expected.

    Other labels are those of classifiers.
    """
    judged = expected == "kto" or (expected == "auto" and read_flag(fields.get("label")) is not None)
    return judged and name in CHAT_FORMATS


def prompt_format(fields: Mapping[str, Any]) -> str | None:
    """Return the chat format of a pair's prompt; None if only ``chosen`` and ``rejected`` hold it."""
    return next((name for key, name in _PROMPT_FIELDS.items() if _filled(fields, key)), None)


def read_flag(value: object) -> bool | None:
    """Return a truth value, which CSV holds as a text; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def _first_format(fields: Mapping[str, Any], names: Sequence[str]) -> str | None:
    candidates = [(name, keys) for name, keys in _FORMATS_BY_PRIORITY if name in names]
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


def unused_fields(
    fields: Mapping[str, Any], name: str, columns: Mapping[str, str] | None, *, labelled: bool = False
) -> list[str]:
    """Return the fields that a row's format does not read: identifiers, labels, and other renderings of the row.

    Raises:
        BadRowError: If a part of the conversation would be lost, or a column that the user named.
    """
    if name == "preference":
        prompt = FIELDS[prompt_format(fields) or "messages"] - {"output", "completion"}
        used = prompt | {"chosen", "rejected"}
    else:
        used = FIELDS[name] | ({"label"} if labelled else set())
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
    filled = [other for other in CHAT_FORMATS if all(_filled(fields, key) for key in FORMATS[other])]
    others = [other for other in filled if other != name]
    return next((key for key in content if not any(key in FIELDS[other] for other in others)), None)


def _remedy(field: str, name: str) -> str:
    if field in _MEDIA:
        return "cannot be used by a model that reads text only; remove the row or the field"
    if field in SYSTEM or field in TOOLS:
        return (
            f"has no place in a row of format '{name}', which is trained as it stands; remove it, or give "
            "the row as messages"
        )
    if name == "preference":
        return f"is not read beside 'chosen' and 'rejected'; for a prompt, set data.columns: {{prompt: {field}}}"
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
