"""Finds documents with equal tokens, within the training data and between training and held-out data."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from phi3_lightning.data.packing import Ints
from phi3_lightning.data.tokenized import TokenizedDataset

_LISTED = 3  # copies that are named by their places


class Part(NamedTuple):
    """Documents of a split."""

    prepared: TokenizedDataset
    """The tokenised set that they belong to."""
    documents: Ints
    """Their indices in it, ascending, shape (documents,)."""


@dataclass(frozen=True)
class Copies:
    """Documents that repeat others."""

    count: int
    """How many repeat another one."""
    places: list[str]
    """Places of the first few, each with the place of the document that it repeats."""

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.places) else ""
        return f"{self.count:,}" + (f": {', '.join(self.places)}{more}" if self.places else "")


def repeated(part: Part) -> Copies:
    """Find documents that equal an earlier one, token by token."""
    _, first, inverse = np.unique(_hashes(part), return_index=True, return_inverse=True)
    originals = first[inverse]
    later = np.flatnonzero(originals != np.arange(len(originals)))
    return _copies(part, later, part, originals[later])


def shared(held_out: Part, train: Part) -> Copies:
    """Find held-out documents that equal a training document, token by token."""
    hashes, first = np.unique(_hashes(train), return_index=True)
    held_out_hashes = _hashes(held_out)
    at = np.minimum(np.searchsorted(hashes, held_out_hashes), len(hashes) - 1)
    copies = np.flatnonzero(hashes[at] == held_out_hashes)
    return _copies(held_out, copies, train, first[at[copies]])


def _hashes(part: Part) -> Ints:
    return part.prepared.column("hash")[part.documents]


def _copies(part: Part, copies: Ints, other: Part, originals: Ints) -> Copies:
    places = part.prepared.describe(part.documents[copies[:_LISTED]].tolist())
    equals = other.prepared.describe(other.documents[originals[:_LISTED]].tolist())
    return Copies(len(copies), [f"{place} is {equal}" for place, equal in zip(places, equals, strict=True)])
