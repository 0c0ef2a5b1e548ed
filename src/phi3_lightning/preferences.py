"""Which rows an objective learns from."""

from typing import Final, Literal

from phi3_lightning.batch import Batch
from phi3_lightning.config import Objective
from phi3_lightning.config.checks import require
from phi3_lightning.contracts import DataOfOneKind
from phi3_lightning.objectives import PAIRWISE

_ROWS: Final[dict[str, tuple[str, str]]] = {
    "chat": ("chats", "supervised"),
    "pair": ("pairs", "one of dpo, ipo, orpo and simpo"),
    "labelled": ("answers with a label", "kto"),
}
"""Rows of each kind, and the objectives that learn from them."""
_OTHER_WAYS: Final[dict[tuple[str, str], str]] = {
    ("labelled", "pair"): "for kto, write a pair as two rows: prompt, completion, and label true or false",
    ("pair", "chat"): "data.columns: {chosen: ..., rejected: ...} names the columns of the answers",
    ("labelled", "chat"): "data.format: kto reads labels of 1 and 0 too, data.columns: {label: ...} names their column",
    ("chat", "labelled"): "a data.format of chats, such as messages, trains the answers whatever their labels",
    ("chat", "pair"): "data.columns: {completion: chosen} trains the chosen answers, {messages: chosen} whole chats",
}
"""How rows of a kind, the second, can become rows of another."""


def learns_from(objective: Objective) -> Literal["chat", "pair", "labelled"]:
    """Return the kind of the rows that an objective learns from."""
    return "pair" if objective.name in PAIRWISE else "labelled" if objective.name == "kto" else "chat"


def check_data(objective: Objective, data: DataOfOneKind) -> None:
    """Refuse data that an objective cannot learn from, as far as they are known.

    Raises:
        ConfigError: If their rows are of another kind, or a micro-batch has one answer, which KTO cannot compare.
    """
    for split, (kind, place) in data.first_rows().items():
        _check_kind(objective, kind, f"data.{split}", f" ({place})")
    options = data.hparams
    alone = options["batch_size"] == 1 and options["max_tokens_per_batch"] is None and not options["packing"]
    remedy = "kto's baseline is a mean over the other answers of a micro-batch; give 2 or more, or data.packing: true"
    require(objective.name != "kto" or not alone, "data.batch_size", options["batch_size"], remedy)


def check_batch(objective: Objective, batch: Batch) -> None:
    """Refuse a batch of another kind than the objective learns from.

    Raises:
        ConfigError: If chats meet a preference objective, or preferences another one.
    """
    if any(batch["document_ids"]):  # a filler batch is of no kind
        kind = "chat" if "preferred" not in batch else "pair" if "shared_lengths" in batch else "labelled"
        _check_kind(objective, kind, "data")


def _check_kind(objective: Objective, kind: str, source: str, place: str = "") -> None:
    wanted = learns_from(objective)
    (rows, _), (other_rows, others) = _ROWS[wanted], _ROWS[kind]
    remedy = (
        f"it learns from {rows}, and the rows of {source} are {other_rows}{place}; give it such rows, or set {others}"
    )
    if way := _OTHER_WAYS.get((wanted, kind)):
        remedy = f"{remedy}; {way}"
    require(kind == wanted, "model.objective.name", objective.name, remedy)
