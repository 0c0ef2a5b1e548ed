"""Figures of preferences for the preview: what pairs share, and whether the better answers are longer."""

import numpy as np

from phi3_lightning.data.packing import Ints
from phi3_lightning.data.tokenized import TokenizedDataset


def preference_facts(prepared: TokenizedDataset, documents: Ints) -> dict[str, str]:
    """Return figures of the documents with these indices; chats have none."""
    kind = prepared.statistics.kind
    if kind == "chat":
        return {}
    chosen, rejected = (tokens[documents] for tokens in _answer_tokens(prepared))
    if kind == "pair":
        shared, lengths = prepared.column("shared_length")[documents], prepared.lengths()[documents]
        medians = f"median {np.median(chosen):.0f} chosen, {np.median(rejected):.0f} rejected"
        longer = f"the chosen one is longer in {np.mean(chosen > rejected):.0%} of pairs"
        return {
            "pairs": f"{len(documents):,}; {shared.sum() / lengths.sum():.1%} of their tokens repeat the prompt",
            "tokens of an answer": f"{medians}; {longer}",
        }
    good = prepared.column("preferred")[documents] == 1
    labels = [(name, flags) for name, flags in (("good", good), ("bad", ~good)) if flags.any()]
    return {
        "answers by label": ", ".join(f"{flags.sum():,} {name}" for name, flags in labels),
        "tokens of an answer": ", ".join(f"median {np.median(chosen[flags]):.0f} {name}" for name, flags in labels),
    }


def _answer_tokens(prepared: TokenizedDataset) -> tuple[Ints, Ints]:
    """The trained tokens of the chosen and of the rejected side of each document, each of shape (documents,)."""
    spans = prepared.table.data.column("spans").combine_chunks()
    edges = np.asarray(spans.flatten(), dtype=np.int64)
    owners = np.repeat(np.arange(len(spans)), np.diff(np.asarray(spans.offsets)) // 2)
    starts, tokens = edges[0::2], edges[1::2] - edges[0::2]
    chosen = prepared.column("chosen_length")
    of_rejected = (chosen[owners] > 0) & (starts >= chosen[owners])
    return _sums(owners, tokens * ~of_rejected, len(spans)), _sums(owners, tokens * of_rejected, len(spans))


def _sums(owners: Ints, tokens: Ints, documents: int) -> Ints:
    return np.bincount(owners, tokens, documents).astype(np.int64)
