"""JSON lines: a partial file that survives an interruption, and a final one that is written whole."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info


class PartialJsonl:
    """The lines of one rank so far, in a file of its own beside ``path``, the final file for all ranks."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path.with_suffix(f".partial.{rank}.jsonl")
        self.lines: list[dict[str, Any]] = []

    def add(self, line: dict[str, Any]) -> None:
        """Append a line to the file; the first one replaces the file of an earlier run."""
        if not self.lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a" if self.lines else "w", encoding="utf-8") as file:
            file.write(_dumps(line))
        self.lines.append(line)

    def log_path(self) -> None:
        """Log where the lines of an interrupted run are."""
        if self.lines:
            rank_zero_info(f"interrupted: {len(self.lines)} answers so far in {self.path}")

    def remove(self) -> None:
        """Delete the file and forget its lines."""
        self.path.unlink(missing_ok=True)
        self.lines = []


def write_jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a file of JSON lines, which a reader sees whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(map(_dumps, lines)), encoding="utf-8")
    temporary.replace(path)


def _dumps(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"
