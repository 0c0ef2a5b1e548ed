"""The rows of a data set that cannot be used, by cause, as text."""

from typing import Final

LISTED_PLACES: Final = 3
"""Rows of one cause that are named."""
_LISTED_CAUSES: Final = 10


class BadRows:
    """Rows that cannot be used. Rows with one cause share a line."""

    def __init__(self) -> None:
        self.count = 0
        self._causes: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, place: str, why: str) -> None:
        """Count a row, with its place and what is wrong with it."""
        self.count += 1
        if why in self._causes or len(self._causes) < _LISTED_CAUSES:
            places = self._causes.setdefault(why, [])
            self._counts[why] = self._counts.get(why, 0) + 1
            if len(places) < LISTED_PLACES:
                places.append(place)

    def __str__(self) -> str:
        lines = [f"  {name_places(places, self._counts[why])}: {why}" for why, places in self._causes.items()]
        rest = self.count - sum(self._counts.values())
        return "\n".join([*lines, *([f"  and {rest} more"] if rest else [])])

    def error(self, read: int) -> str:
        """Return the text of an error; ``read`` is the number of all rows."""
        remedy = "Fix them." if self.count == read else "Fix them, or set data.on_bad_row: skip to leave such rows out."
        return f"{self.count} of {read} rows cannot be used:\n{self}\n{remedy}"


def name_places(places: list[str], count: int) -> str:
    """Return the first places, and how many more there are."""
    return ", ".join(places) + (f" and {count - len(places)} more" if count > len(places) else "")
