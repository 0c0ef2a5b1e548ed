"""The work that every contender does."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

IGNORE_INDEX = -100
TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The layers that are adapted."""


class Row(NamedTuple):
    """A chat in tokens: labels are the ids where they are trained, and -100 elsewhere, unshifted."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Task:
    """Rows, adapter and optimiser; a step reads about ``row_tokens`` real tokens, packed or padded.

    Args:
        base: Folder of the base model.
        rows: File of JSON lines with ``input_ids`` and ``labels``, for ``steps`` steps, or for one that is repeated.
        pad: A token id that no row holds: what else a batch holds is real.
        row_tokens: Length of a packed row. One is a step.
        micro_batch: Rows of a padded micro-batch.
        accumulate: Padded micro-batches of a step.
        steps: Optimiser steps.
        warmup: The first of them, which are not timed; at least one.
        device: ``cpu`` or ``cuda``.
        out: Folder for the adapter, in PEFT's format.
        r: Rank of the adapters.
        alpha: Their scale is alpha / r.
        dropout: On their inputs.
        lr: Learning rate of AdamW, constant, without weight decay and clipping.
        seed: For the adapters' start, dropout and order.
    """

    base: str
    rows: str
    pad: int
    row_tokens: int
    micro_batch: int
    accumulate: int
    steps: int
    warmup: int
    device: str
    out: str
    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    lr: float = 1e-3
    seed: int = 0

    def read(self) -> list[Row]:
        return read_rows(self.rows)


def read_rows(path: str | Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in Path(path).read_text().splitlines()]


def write_rows(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows))
