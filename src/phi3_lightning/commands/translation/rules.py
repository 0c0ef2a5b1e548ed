"""How a key of a script is translated."""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

Given = Mapping[str, Any]
"""The dictionary that a key stands in."""


class Equal(NamedTuple):
    """What a key comes to."""

    settings: Mapping[str, Any] = {}
    """Key paths and values; none where things are so here anyway."""
    note: str | None = None
    """What is different all the same, and what to do."""


class Rule(NamedTuple):
    """How a key is translated."""

    path: str
    """Where its value belongs; empty where nothing is set."""
    convert: Callable[[Any, Given], Any]
    """From the value and its dictionary to the value of ``path``, or to an Equal."""


SAME: Final = Equal()
"""Nothing to set: it is so here."""


def alone(path: str, convert: Callable[[Any], Any]) -> Rule:
    """Make a rule that looks at no other key.

    Args:
        path: Where the value belongs.
        convert: From the value to the one of ``path``, or to an Equal.
    """
    return Rule(path, lambda value, _: convert(value))


def unless(off: Any, note: str) -> Rule:
    """Make a rule for what has no equal, and of which one value is how things are here.

    Args:
        off: That value.
        note: What to do about any other.
    """
    return alone("", lambda value: SAME if value == off else Equal(note=note))


def whole(value: Any) -> int:
    """Return a number without a fraction, also from text.

    Args:
        value: The number.

    Raises:
        ValueError: If it has a fraction.
    """
    if float(value) != int(float(value)):
        raise ValueError("it is a whole number")
    return int(float(value))


def as_it_is(value: Any) -> Any:
    """Return a value, with a list for a set or a tuple, which YAML has no word for.

    Args:
        value: The value.
    """
    return list(value) if isinstance(value, set | tuple) else value
