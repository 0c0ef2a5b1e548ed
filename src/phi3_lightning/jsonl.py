"""Lines that are kept on the disk while a run goes on, so that an interrupted one has not lost them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed
from lightning.pytorch.utilities import rank_zero_info


class PartialJsonl:
    """What a rank has so far, in a file of its own beside the one that will hold everything.

    Args:
        path: The file that will hold everything.
        rank: This rank.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path.with_suffix(f".partial.{rank}.jsonl")
        self.lines: list[dict[str, Any]] = []

    def add(self, line: dict[str, Any]) -> None:
        """Keep a line; what an earlier run left is replaced by the first.

        Args:
            line: An object for JSON.
        """
        if not self.lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a" if self.lines else "w", encoding="utf-8") as file:
            file.write(_line(line))
        self.lines.append(line)

    def tell(self) -> None:
        """Say where the lines are."""
        if self.lines:
            rank_zero_info(f"interrupted: {len(self.lines)} answers so far in {self.path}")

    def remove(self) -> None:
        """Delete the file: everything is elsewhere now."""
        self.path.unlink(missing_ok=True)
        self.lines = []


def write_jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines; a reader never sees half of them.

    Args:
        path: The file.
        lines: Objects for JSON.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(map(_line, lines)), encoding="utf-8")
    temporary.replace(path)


def all_gather_object(trainer: pl.Trainer, mine: Any) -> list[Any]:
    """Return what each rank has.

    Args:
        trainer: Knows the ranks; all of them call this.
        mine: What this rank has.
    """
    found = [mine]
    if trainer.world_size > 1:
        found = [None] * trainer.world_size
        torch.distributed.all_gather_object(found, mine)
    return found


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"
