"""Which documents share a row, and which rows share a batch. Pure numpy: lengths in, a plan out."""

import hashlib
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """Batches of rows of documents, as flat arrays."""

    documents: Ints
    """Indices of documents, row by row, shape (documents,)."""
    rows: Ints
    """Where each row ends in ``documents``, after a leading 0, shape (rows + 1,)."""
    batches: Ints
    """Where each batch ends in ``rows``, after a leading 0, shape (batches + 1,)."""

    def __len__(self) -> int:
        return len(self.batches) - 1

    def __getitem__(self, batch: int) -> list[list[int]]:
        """The documents of one batch, row by row."""
        ends = self.rows[self.batches[batch] : self.batches[batch + 1] + 1]
        return [self.documents[start:end].tolist() for start, end in pairwise(ends)]

    def tokens(self, lengths: Ints) -> Ints:
        """Return the tokens of each batch, shape (batches,), by the tokens of each document of the data set."""
        return np.add.reduceat(lengths[self.documents], self.rows[self.batches[:-1]])

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that name exactly this plan."""
        digest = hashlib.blake2b(digest_size=8)
        for array in (self.documents, self.rows, self.batches):
            digest.update(array.tobytes() + b"|")
        return digest.hexdigest()


def pack(lengths: Ints, capacity: int) -> list[list[int]]:
    """Put whole documents into as few rows as best fit decreasing finds.

    Args:
        lengths: Tokens of each document, none above ``capacity``, shape (documents,).
        capacity: Tokens that a row holds.

    Returns:
        The documents of each row. The same lengths always give the same rows.
    """
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the tokens that still fit
    open_spaces = 0  # bit n is set where by_space[n] has a row
    order = np.argsort(-lengths, kind="stable")
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = open_spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                open_spaces ^= 1 << space
            rows[row].append(document)
        else:
            space, row = capacity, len(rows)
            rows.append([document])
        left = space - length
        if not by_space[left]:
            open_spaces |= 1 << left
        by_space[left].append(row)
    return rows


def plan_batches(
    lengths: Ints,
    *,
    batch_size: int,
    capacity: int | None,
    max_tokens: int | None = None,
    seed: int | None = None,
    length_boundary: int | None = None,
    chosen_lengths: Ints | None = None,
) -> Plan:
    """Plan, once for a run, which documents are computed together.

    Args:
        lengths: Tokens of each document, of a pair those of both sides, shape (documents,).
        batch_size: Rows of a batch.
        capacity: Tokens of a packed row; None gives each document a row of its own.
        max_tokens: Tokens of a batch, padding included; in place of ``batch_size``.
        seed: Shuffles rows before they are put into batches; None keeps batches in order of length, longest first.
        length_boundary: Documents longer than this never share a batch with shorter ones; a pair is as long as its
            longer side.
        chosen_lengths: Tokens of the chosen side of each pair, shape (documents,); None: no pairs.

    Returns:
        The plan. Rows of a batch have similar lengths, so that little of it is padding.
    """
    rng = None if seed is None else np.random.default_rng(seed)
    sides = lengths if chosen_lengths is None else np.maximum(chosen_lengths, lengths - chosen_lengths)
    long = sides > (sides.max(initial=0) if length_boundary is None else length_boundary)
    batches = []
    for members in (np.flatnonzero(long), np.flatnonzero(~long)):
        if rng is not None:
            members = rng.permutation(members)  # documents of one length would otherwise be packed in the file's order
        if capacity is None:
            rows = [[document] for document in members.tolist()]
        else:
            rows = [members[row].tolist() for row in pack(lengths[members], capacity)]
        batches += _group(rows, lengths, batch_size, max_tokens, rng)
    flat = [row for batch in batches for row in batch]
    return Plan(
        documents=np.array([document for row in flat for document in row], dtype=np.int64),
        rows=np.cumsum([0, *map(len, flat)], dtype=np.int64),
        batches=np.cumsum([0, *map(len, batches)], dtype=np.int64),
    )


def _group(
    rows: list[list[int]], lengths: Ints, batch_size: int, max_tokens: int | None, rng: np.random.Generator | None
) -> list[list[list[int]]]:
    tokens = np.array([lengths[row].sum() for row in rows], dtype=np.int64)
    order = np.arange(len(rows)) if rng is None else rng.permutation(len(rows))
    buffer_size = len(rows) if rng is None else 256  # sorting all rows would make batches of one kind of text
    for start in range(0, len(rows), max(buffer_size, 1)):
        buffer = order[start : start + buffer_size]
        order[start : start + buffer_size] = buffer[np.argsort(-tokens[buffer], kind="stable")]
    batches: list[list[list[int]]] = []
    longest = 0
    for row in order.tolist():
        longest = max(longest, int(tokens[row]))
        full = batch_size if max_tokens is None else max_tokens // longest
        if not batches or len(batches[-1]) >= full:
            batches.append([])
            longest = int(tokens[row])
        batches[-1].append(rows[row])
    return batches


def sample_mixture(items: Ints, weights: list[float], seed: int) -> Ints:
    """Choose as many documents as possible, none of them twice, so that sources have given shares.

    Args:
        items: The source of each document, shape (documents,).
        weights: The share of each source; only their proportions matter.
        seed: Decides which documents of a source are left out.

    Returns:
        The chosen documents, in ascending order, shape (chosen,).
    """
    counts = np.bincount(items, minlength=len(weights))
    shares = np.array(weights) / np.sum(weights)
    sizes = np.floor(shares * np.min(counts / shares) + 1e-9).astype(np.int64)
    shuffled = np.random.default_rng(seed).permutation(len(items))
    chosen = [shuffled[items[shuffled] == item][:size] for item, size in enumerate(sizes)]
    return np.sort(np.concatenate(chosen))
