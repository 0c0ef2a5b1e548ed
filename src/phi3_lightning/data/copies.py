"""Documents with the same tokens: within the training data, and in training and held-out data."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from phi3_lightning.data.packing import Ints
from phi3_lightning.data.prepare import TokenizedDataset

_SHOWN = 3


class Part(NamedTuple):
    """Documents of a split.

    Args:
        prepared: The tokenised set that they belong to.
        documents: Which of it they are, in order, shape (documents,).
    """

    prepared: TokenizedDataset
    documents: Ints


@dataclass(frozen=True)
class Copies:
    """Documents that there are twice.

    Args:
        count: How many there are too many.
        places: The first few, each with the place of the document that it repeats.
    """

    count: int
    places: list[str]

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.places) else ""
        return f"{self.count:,}" + (f": {', '.join(self.places)}{more}" if self.places else "")


def repeated(part: Part) -> Copies:
    """Find documents that an earlier one equals, token by token.

    Args:
        part: The documents.
    """
    _, first, inverse = np.unique(_hashes(part), return_index=True, return_inverse=True)
    originals = first[inverse]
    later = np.flatnonzero(originals != np.arange(len(originals)))
    return _copies(part, later, part, originals[later])


def shared(held_out: Part, train: Part) -> Copies:
    """Find held-out documents that are trained as well, token by token.

    Args:
        held_out: Documents to validate or test with.
        train: Documents to train on.
    """
    hashes, first = np.unique(_hashes(train), return_index=True)
    wanted = _hashes(held_out)
    at = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
    found = np.flatnonzero(hashes[at] == wanted)
    return _copies(held_out, found, train, first[at[found]])


def _hashes(part: Part) -> Ints:
    return part.prepared.column("hash")[part.documents]


def _copies(part: Part, copies: Ints, other: Part, originals: Ints) -> Copies:
    places = part.prepared.describe(part.documents[copies[:_SHOWN]].tolist())
    equals = other.prepared.describe(other.documents[originals[:_SHOWN]].tolist())
    return Copies(len(copies), [f"{place} is {equal}" for place, equal in zip(places, equals, strict=True)])
