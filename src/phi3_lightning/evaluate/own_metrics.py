"""A user's own metrics of answers: functions ``(answer, reference, row) -> float``, by import path."""

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from traceback import extract_tb
from typing import Any, Literal, Protocol, runtime_checkable

from phi3_lightning.config.checks import require
from phi3_lightning.contracts import origins
from phi3_lightning.errors import ConfigError
from phi3_lightning.evaluate.report import TITLES
from phi3_lightning.metrics import PreferenceMetrics
from phi3_lightning.metrics.answers import Answer, Score, mean_score

Measure = Callable[[str, str, Mapping[str, Any]], float]
"""Returns the value of an answer, from its text, the reference and the row."""

OPTION = "evaluation.metrics"
FORM = "write it as module:function, such as my_metrics:keywords"


@runtime_checkable
class HasRows(Protocol):
    """A data module that can read its rows again, with all their fields."""

    def rows(self, stage: Literal["validate", "test"], document_ids: list[int]) -> list[dict[str, Any]]:
        """Return the rows of documents of a stage."""


def own_scores(metrics: str | Sequence[str | Measure]) -> dict[str, Score]:
    """Return the scores of a user's own metrics, each the mean over answers, by the names of the functions.

    Args:
        metrics: Import paths, ``module:function``, of which the module may be in the working directory; in a script
            also the functions themselves.

    Raises:
        ConfigError: If a function cannot be imported, does not take ``(answer, reference, row)``, or has the name of
            another metric.
    """
    taken = {*TITLES, "answered_rows", *(name for name, _ in PreferenceMetrics(paired=True).named_children())}
    result: dict[str, Score] = {}
    for metric in [metrics] if isinstance(metrics, str) else metrics:
        function = _imported(metric) if isinstance(metric, str) else metric
        name = getattr(function, "__name__", type(function).__name__)
        path = metric if isinstance(metric, str) else f"{function.__module__}:{name}"
        require(name.isidentifier(), OPTION, path, "it has no name for the curve; give a function made by def")
        require(name not in taken, OPTION, path, f"there is a metric {name} already; give the function another name")
        require(name not in result, OPTION, path, f"two functions are called {name}; give one of them another name")
        try:
            inspect.signature(function).bind("answer", "reference", {})
        except TypeError as error:
            raise ConfigError(
                f"{OPTION}: {path} cannot be called with (answer, reference, row): {error}; give it these arguments"
            ) from None
        result[name] = mean_score(partial(_value, function, path), f"the mean of {path}")
    return result


def rows_by_id(
    data: object, stage: Literal["validate", "test"], document_ids: list[int]
) -> dict[int, Mapping[str, Any]]:
    """Return the rows of documents, by id; of a data module that cannot read them again, where they came from."""
    if isinstance(data, HasRows):
        rows: list[dict[str, Any]] = data.rows(stage, document_ids)
    else:
        rows = [origin.content() for origin in origins(data, stage, document_ids)]
    return dict(zip(document_ids, rows, strict=True))


def _imported(path: str) -> Measure:
    module_name, _, name = path.partition(":")
    require(bool(module_name) and name.isidentifier(), OPTION, path, FORM)
    folder = str(Path.cwd())
    sys.path.append(folder)  # where `python cli.py` finds modules too, and an installed command does not
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(f"{OPTION}: {path}: {module_name} cannot be imported: {_described(error)}; {FORM}") from error
    finally:
        sys.path.remove(folder)
    function = getattr(module, name, None)
    if not callable(function):
        names = ", ".join(key for key, value in vars(module).items() if inspect.isfunction(value)) or "none"
        raise ConfigError(f"{OPTION}: {path}: {module_name} has no function {name}; its functions: {names}")
    return function  # type: ignore[no-any-return]


def _value(function: Measure, path: str, answer: Answer) -> float:
    try:
        value = float(function(answer.text, answer.reference, answer.row))
    except Exception as error:  # whatever the user's function raises
        raise ConfigError(f"{OPTION}: {path}: {_described(error)}") from error
    if not math.isfinite(value):
        raise ConfigError(f"{OPTION}: {path}: it returned {value}; return a finite number")
    return value


def _described(error: Exception) -> str:
    """An error in one line, with the line of the user's code that raised it."""
    frame = extract_tb(error.__traceback__)[-1]
    is_own = frame.filename not in (__file__, importlib.__file__) and not frame.filename.startswith("<frozen ")
    place = f" ({frame.filename}:{frame.lineno})" if is_own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
