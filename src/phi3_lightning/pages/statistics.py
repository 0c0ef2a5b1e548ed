"""The table of statistics of each split, for the test report and for model cards."""

from collections.abc import Mapping
from typing import Any

COLUMNS = ("split", "rows read", "documents kept", "truncated", "dropped", "tokens", "trained tokens")


def rows(statistics: Mapping[str, Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Return a row for each split of a data module's ``statistics``."""
    return [
        (
            split,
            counts["read"],
            counts["kept"],
            counts["cut"],
            ", ".join(f"{count} ({reason})" for reason, count in counts["dropped"].items()) or "0",
            counts["tokens"],
            counts["supervised_tokens"],
        )
        for split, counts in statistics.items()
    ]
