"""From held-out documents to prompts and references: the reference of a document is its last trained turn."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np

from phi3_lightning.batch import IGNORE_INDEX, Batch
from phi3_lightning.batch.documents import document_spans
from phi3_lightning.batch.padding import end_of_text_ids
from phi3_lightning.distributed.collectives import all_gather_dict
from phi3_lightning.evaluate.ranking import reference_documents


@dataclass(frozen=True)
class Case:
    """A prompt and its reference answer."""

    document_id: int
    prompt: list[int]
    """The tokens before the last trained turn, exactly as in training."""
    reference: list[int]
    """The tokens of that turn, including the stop token."""


def cases(batch: Batch) -> list[Case]:
    """Return a case for each document of a batch; one without a trained turn has an empty reference."""
    ids, supervised = batch["input_ids"].cpu(), (batch["labels"] != IGNORE_INDEX).cpu().numpy()
    return [
        _case(document_id, ids[row, tokens].tolist(), supervised[row, tokens])
        for row, tokens, document_id in document_spans(batch)
    ]


def _case(document_id: int, ids: list[int], supervised: np.ndarray[Any, np.dtype[np.bool_]]) -> Case:
    positions = np.flatnonzero(supervised)
    if not len(positions):
        return Case(document_id, ids, [])
    end = int(positions[-1]) + 1
    gaps = np.flatnonzero(~supervised[:end])
    begin = int(gaps[-1]) + 1 if len(gaps) else 0
    return Case(document_id, ids[:begin], ids[begin:end])


def unusable(case: Case, tokenizer: Any) -> str | None:
    """Return why a case cannot be answered or scored; None: it can."""
    if not case.reference:
        return "no trained turn"
    if len(case.prompt) < 2:  # a text without turns: its first token is never trained
        return "no prompt before the trained text"
    end = case.reference[-1]
    added = tokenizer.added_tokens_decoder.get(end)
    if end != tokenizer.eos_token_id and not (added is not None and added.special):
        return "the reference was cut off"
    if not tokenizer.decode(case.reference, skip_special_tokens=True).strip():
        return "empty reference"
    return None


def stop_ids(cases: Iterable[Case], tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the last ones of all references, and the tokenizer's ends of text."""
    return sorted({case.reference[-1] for case in cases} | set(end_of_text_ids(tokenizer)))


def choose(document_ids: Iterable[int], count: int | None) -> list[int]:
    """Choose at most ``count`` rows (None: all) at random, but always the same; return sorted ids.

    The choice from several shares is the choice from those of each share.
    """
    ids = sorted(set(document_ids), key=_draw)
    return sorted(ids[:count])


def _draw(document_id: int) -> bytes:
    return hashlib.blake2b(str(document_id).encode(), digest_size=8).digest()


class CaseCollector:
    """Collects the cases of batches, of preferences those of chosen or good answers, of which some are to be answered.

    Args:
        count: How many rows are to be answered; None: all.
    """

    def __init__(self, count: int | None) -> None:
        self.count = count
        self.left_out: dict[int, str] = {}
        """Rows that cannot be answered or scored, with the reason."""
        self._cases: dict[int, Case] = {}

    def add(self, batch: Batch, tokenizer: Any) -> None:
        """Add the documents of a batch."""
        documents = cases(batch)
        for case in (documents[index] for index in reference_documents(batch) if documents):
            reason = unusable(case, tokenizer)
            if reason is None:
                self._cases[case.document_id] = case
            else:
                self.left_out[case.document_id] = reason
        if self.count is not None and len(self._cases) > 2 * self.count:  # not a copy of all rows
            self._cases = self._chosen(self._cases)

    def choose(self, trainer: pl.Trainer) -> list[Case]:
        """Return the cases to be answered, the same on every rank, in the order of their rows; all ranks call this."""
        chosen = self._chosen(all_gather_dict(trainer, self._chosen(self._cases)))
        return list(chosen.values())

    def _chosen(self, cases: dict[int, Case]) -> dict[int, Case]:
        return {document_id: cases[document_id] for document_id in choose(cases, self.count)}
