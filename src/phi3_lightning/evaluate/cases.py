"""From held-out documents to prompts and references: the last trained turn is what is asked for."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from phi3_lightning.batch import IGNORE_INDEX, Batch
from phi3_lightning.batch.documents import document_spans


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    eos_token_id: int | None

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The added tokens, by id."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        """Turn ids into text."""


@dataclass(frozen=True)
class Case:
    """A prompt, and the answer that it should get.

    Args:
        document_id: Which document of the data.
        prompt: The tokens before the last trained turn, exactly as they were in training.
        reference: The tokens of that turn, with the one that ends it.
    """

    document_id: int
    prompt: list[int]
    reference: list[int]


def cases(batch: Batch) -> list[Case]:
    """Take the documents of a batch apart.

    Args:
        batch: Held-out rows.

    Returns:
        A case a document; one without a trained turn has an empty reference.
    """
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


def unusable(case: Case, tokenizer: Tokenizer) -> str | None:
    """Say why a case cannot be asked.

    Args:
        case: A case.
        tokenizer: Knows special tokens, one of which ends each whole turn.

    Returns:
        The reason, or None where it can.
    """
    if not case.reference:
        return "no trained turn"
    if len(case.prompt) < 2:  # a text without turns: its first token is never trained
        return "no prompt before the trained text"
    if not _ends_turns(case.reference[-1], tokenizer):
        return "the reference was cut off"
    if not tokenizer.decode(case.reference, skip_special_tokens=True).strip():
        return "empty reference"
    return None


def _ends_turns(token: int, tokenizer: Tokenizer) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    return token == tokenizer.eos_token_id or (added is not None and added.special)


def stop_ids(found: Iterable[Case], tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that end an answer: those that end a reference, and the tokenizer's end of text.

    Args:
        found: What is asked, by all ranks.
        tokenizer: The tokenizer.
    """
    ends = {case.reference[-1] for case in found}
    return sorted(ends | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()))


def choose(document_ids: Iterable[int], count: int | None) -> list[int]:
    """Choose rows, the same ones each time that the same rows are given.

    Args:
        document_ids: The rows that can be asked, of all ranks, in any order.
        count: How many at most; None: all.

    Returns:
        Their ids, in order.
    """
    everyone = sorted(set(document_ids))
    if count is None or count >= len(everyone):
        return everyone
    return sorted(np.random.default_rng(0).choice(everyone, count, replace=False).tolist())
