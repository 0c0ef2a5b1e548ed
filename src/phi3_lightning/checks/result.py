"""What a check found."""

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["ok", "FAIL", "skipped"]


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Args:
        name: What was checked.
        outcome: Whether it holds; skipped where it could not be tried, and the figure says why.
        figure: What was measured, with its limit.
        remedy: What to do where it fails.
    """

    name: str
    outcome: Outcome
    figure: str
    remedy: str

    @classmethod
    def of(cls, name: str, holds: bool, figure: str, remedy: str) -> "Result":
        """Return the result of a check that was tried.

        Args:
            name: What was checked.
            holds: Whether it holds.
            figure: What was measured, with its limit.
            remedy: What to do where it fails.
        """
        return cls(name, "ok" if holds else "FAIL", figure, remedy)

    @classmethod
    def skipped(cls, name: str, why: str) -> "Result":
        """Return the result of a check that could not be tried.

        Args:
            name: What would have been checked.
            why: What was missing.
        """
        return cls(name, "skipped", why, "")
