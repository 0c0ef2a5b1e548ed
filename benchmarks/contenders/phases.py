"""Where the seconds of a whole job go, whichever library does it."""

import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PHASES = ("start", "tokenising", "loading", "training", "validation", "samples", "checkpoint", "export", "end")
"""In the order of a job; ``start`` is the interpreter and its imports, ``end`` what follows the last phase."""


class Phases:
    """Adds up the seconds of each phase; one within another counts for itself alone.

    Args:
        first: The phase that the process is in.
        started: When its command was given, as by ``time.time``.
    """

    def __init__(self, first: str, started: float) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open = [first]
        self._since = started

    def _charge(self) -> None:
        now = time.time()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs in the context as a phase."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Count each call of a function or method as a phase."""
        original: Callable[..., Any] = getattr(owner, attribute)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return original(*args, **kwargs)

        setattr(owner, attribute, timed)

    def write(self, path: str) -> None:
        """Write the seconds until now."""
        self._charge()
        Path(path).write_text(json.dumps(self.seconds))
