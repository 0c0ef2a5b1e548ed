"""Checks values by type and range, and makes sections of the configuration from mappings."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from phi3_lightning import renamed
from phi3_lightning.errors import ConfigError


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise a ConfigError that names key path, value and remedy unless a condition holds."""
    if not condition:
        raise ConfigError(f"{key}: {value!r} cannot be used: {remedy}")


def require_choice(key: str, value: object, kind: Any) -> None:
    """Raise a ConfigError that names the key path unless a value is one of the choices of a ``Literal``.

    The command line checks types as well; a script has only this, and a misspelt choice must not pass for another.
    """
    choices = get_args(kind)
    valid = any(value == choice and type(value) is type(choice) for choice in choices)
    require(valid, key, value, f"choose {' or '.join(map(str, choices))}")


def require_types(key: str, config: object) -> None:
    """Raise a ConfigError unless each field of a dataclass, the section ``key``, holds a value of its type."""
    for name, kind in get_type_hints(type(config)).items():
        _require_type(f"{key}.{name}", getattr(config, name), kind)


def _require_type(key: str, value: object, kind: Any) -> None:
    if get_origin(kind) is Literal:
        require_choice(key, value, kind)
    elif get_origin(kind) is dict and isinstance(value, Mapping):
        for name, item in value.items():
            _require_type(f"{key}.{name}", item, get_args(kind)[1])
    else:
        require(_is_of(value, kind), key, value, f"give {_words(kind)}")


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value is of a type; a whole number is a number too, and a tuple or a set a list."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_is_of(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if kind is Any:
        return True
    if origin in (list, tuple):
        return isinstance(value, list | tuple | set) and all(_is_of(item, arguments[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def _words(kind: Any) -> str:
    """A type, in plain words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_words, arguments))
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (list, tuple):
        return f"a list, each of it {_words(arguments[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    return names.get(kind, "a mapping")


Section = TypeVar("Section")

if TYPE_CHECKING:
    Given: TypeAlias = Section | Mapping[str, Any]
    """A section, or a mapping of its keys, as scripts and checkpoints give it."""
else:

    class Given:
        """The section alone, from which the command line makes options."""

        def __class_getitem__(cls, kind):
            return kind


def section(kind: type[Section], value: Section | Mapping[str, Any]) -> Section:
    """Return a section of the configuration, from an instance of its dataclass or a mapping of the fields.

    Raises:
        ConfigError: If the mapping has a key that ``kind`` lacks, or a value out of range.
    """
    if isinstance(value, kind):
        return value
    key = f"model.{kind.__name__.lower()}"
    require(isinstance(value, Mapping), key, value, "give a mapping of its options")
    options = cast("Mapping[str, Any]", value)
    check_names(key, kind, options)
    return kind(**options)


def plain(value: Any) -> dict[str, Any]:
    """Return the fields of a section as the plain types that YAML and checkpoints have."""
    return {name: list(item) if isinstance(item, tuple) else item for name, item in asdict(value).items()}


def check_names(key: str, kind: type, names: Iterable[str]) -> None:
    """Raise a ConfigError for the names that the dataclass of the section ``key`` lacks."""
    renamed.check_keys(key, names)
    known = list(get_type_hints(kind))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"{key}.{name}: there is no such option; {hint}")
