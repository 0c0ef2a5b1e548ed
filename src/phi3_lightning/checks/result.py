"""The result of a check."""

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["ok", "FAIL", "skipped"]


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    name: str
    """What was checked."""
    outcome: Outcome
    """Whether it holds; skipped where it could not be tried, and the figure says why."""
    figure: str
    """What was measured, with its limit."""
    remedy: str
    """What to do where it fails."""

    @classmethod
    def of(cls, name: str, holds: bool, figure: str, remedy: str) -> "Result":
        """Return the result of a check that was tried."""
        return cls(name, "ok" if holds else "FAIL", figure, remedy)

    @classmethod
    def skipped(cls, name: str, why: str) -> "Result":
        """Return the result of a check that could not be tried, and why."""
        return cls(name, "skipped", why, "")
