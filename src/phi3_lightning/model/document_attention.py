"""Attention within documents on a CPU, by plain products of a block of queries with the keys that it sees.

As in FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691), scores and softmax are in float32, what lies wholly
in the future is not computed, and long documents compute their scores again in the backward pass. A block sees its keys
at once, without a running softmax: a CPU is fast at products, and the scores of a block stay near its caches.
"""

from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 192
"""Queries of a block at most."""
MAX_SCORES = 2**21
"""Scores of a block (8 MB), unless one key-value head has more."""
MAX_SAVED_KEYS = 1024
"""Longest document, in keys, whose probabilities are saved in training: attention is a quarter faster with them."""
max_saved_keys: ContextVar[int] = ContextVar("max_saved_keys", default=MAX_SAVED_KEYS)
"""The same in this context; a plan for a GPU, whose kernel saves none, sets it to 0."""


class _Document(NamedTuple):
    start: int
    """First token in the row."""
    queries: int
    shared: int
    """Keys in front of its own: the first tokens of the document before."""
    former: int
    """First token of the document before."""

    def keys_of(self, row: Tensor) -> Tensor:
        """Return the document's keys or values, shape (heads, keys, size), of those of the row."""
        own = row[:, self.start : self.start + self.queries]
        return torch.cat([row[:, self.former : self.former + self.shared], own], dim=1) if self.shared else own

    def gradient_of(self, row: Tensor) -> Tensor:
        """Return where the gradient of the document's keys or values is summed: in that of the row, or in zeros."""
        if self.shared == 0:
            return row[:, self.start : self.start + self.queries]
        return row.new_zeros(len(row), self.shared + self.queries, row.shape[-1])

    def add_to(self, row: Tensor, gradient: Tensor) -> None:
        """Add what :meth:`gradient_of` returned to the gradient of the row, where it is not in it already."""
        if self.shared:
            row[:, self.former : self.former + self.shared] += gradient[:, : self.shared]
            row[:, self.start : self.start + self.queries] += gradient[:, self.shared :]


class _Block(NamedTuple):
    queries: slice
    """Tokens of the row."""
    keys: slice
    """Keys of the document, up to the last query's own."""
    heads: slice
    """Key-value heads, each of which has ``group`` query heads."""
    group: int
    unseen: int
    """Keys in front that the last query does not see any more, by the sliding window."""

    @property
    def query_heads(self) -> slice:
        return slice(self.heads.start * self.group, self.heads.stop * self.group)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the scores."""
        heads, queries, keys = (side.stop - side.start for side in (self.heads, self.queries, self.keys))
        return heads, self.group * queries, keys

    def queries_of(self, row: Tensor) -> Tensor:
        """Return the block's part of the states of queries, shape (key-value heads, group x queries, size)."""
        part = row[self.query_heads, self.queries]
        return part.reshape(*self.shape[:2], part.shape[-1])

    def write_to(self, row: Tensor, states: Tensor) -> None:
        """Set the block's part of a row, the inverse of :meth:`queries_of`."""
        part = row[self.query_heads, self.queries]
        part.copy_(states.view(part.shape))


def _documents(lengths: Sequence[int], shared: Sequence[int]) -> Iterator[_Document]:
    starts = list(accumulate(lengths, initial=0))
    for index, (length, common) in enumerate(zip(lengths, shared, strict=True)):
        yield _Document(starts[index], length, common, starts[max(0, index - 1)])


def _blocks(document: _Document, heads: int, group: int, window: int) -> Iterator[_Block]:
    size = -(-document.queries // -(-document.queries // BLOCK))  # of equal blocks
    for first in range(0, document.queries, size):
        last = min(first + size, document.queries)
        begin = max(0, document.shared + first + 1 - window)
        unseen = max(0, document.shared + last - window - begin)
        queries = slice(document.start + first, document.start + last)
        keys = slice(begin, document.shared + last)
        step = max(1, MAX_SCORES // (group * (last - first) * (keys.stop - begin)))
        for head in range(0, heads, step):
            yield _Block(queries, keys, slice(head, min(head + step, heads)), group, unseen)


def _plan(
    q: Tensor, k: Tensor, lengths: Sequence[int], shared: Sequence[int], window: int, max_saved_keys: int
) -> Iterator[tuple[_Document, list[_Block], bool]]:
    """Yield each document with its blocks, and whether its probabilities are saved."""
    for document in _documents(lengths, shared):
        blocks = list(_blocks(document, len(k), len(q) // len(k), window))
        yield document, blocks, document.shared + document.queries <= max_saved_keys


def _scaled_bmm(a: Tensor, b: Tensor, factor: float) -> Tensor:
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=factor)


def _scores(q: Tensor, keys: Tensor, block: _Block, scaling: float) -> Tensor:
    """Return a block's scores, shape (key-value heads, group x queries, keys), with what is not seen at -inf.

    Args:
        keys: Those of the document, float32.
    """
    scores = _scaled_bmm(block.queries_of(q).float(), keys[block.heads, block.keys].transpose(1, 2), scaling)
    queries = block.queries.stop - block.queries.start
    by_query = scores.view(len(scores), block.group, queries, -1)
    unseen = torch.full((queries, queries), float("-inf"), device=q.device)
    by_query[..., -queries:] += unseen.triu(1)
    if block.unseen:
        by_query[..., :queries] += unseen.tril(block.unseen - queries)
    return scores


@torch.library.custom_op("phi3_lightning::attend_documents", mutates_args=())
def attend_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    shared: list[int],
    scaling: float,
    window: int,
    max_saved_keys: int,
) -> tuple[Tensor, list[Tensor]]:
    """Attend within each document of a row.

    Args:
        q: Shape (heads, tokens, head size).
        k: Shape (key-value heads, tokens, head size), as ``v``.
        lengths: Tokens of each document, which make up the row.
        shared: Tokens of the document before that each document's keys begin with.
        window: How many tokens back a token sees, itself included.
        max_saved_keys: Longest document, in keys, whose probabilities are saved for the backward pass.

    Returns:
        The output, shape (tokens, heads, head size), and the probabilities that are saved for the backward pass, each
        block's in the shape (key-value heads, query heads of each x queries, keys).
    """
    output = q.new_empty(q.shape[1], *q.shape[::2])
    by_head = output.transpose(0, 1)
    probabilities = []
    with torch.autocast(q.device.type, enabled=False):
        for document, blocks, saved in _plan(q, k, lengths, shared, window, max_saved_keys):
            keys, values = document.keys_of(k).float(), document.keys_of(v)
            for block in blocks:
                weights = _scores(q, keys, block, scaling).softmax(-1).to(v.dtype)
                if saved:
                    probabilities.append(weights)
                block.write_to(by_head, torch.bmm(weights, values[block.heads, block.keys]))
    return output, probabilities


@attend_documents.register_fake
def _without_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    shared: list[int],
    scaling: float,  # noqa: ARG001
    window: int,
    max_saved_keys: int,
) -> tuple[Tensor, list[Tensor]]:
    plan = _plan(q, k, lengths, shared, window, max_saved_keys)
    shapes = [block.shape for _, blocks, saved in plan if saved for block in blocks]
    return q.new_empty(q.shape[1], *q.shape[::2]), [v.new_empty(shape) for shape in shapes]


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    q, k, v, *ctx.options = inputs
    ctx.set_materialize_grads(False)  # of the probabilities: zeros as large as they
    ctx.save_for_backward(q, k, v, output[0], *output[1])


def _backward(ctx: Any, grad: Tensor, _: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    q, k, v, output, *probabilities = ctx.saved_tensors
    # a score's gradient is its probability times (grad @ v - delta), with delta the row's sum of both weighted: as two
    # more columns of the product, delta is subtracted before anything is rounded
    delta = (grad.float() * output.float()).sum(-1, keepdim=True).neg_()
    high = delta.to(v.dtype)
    grads = torch.cat([grad.to(v.dtype), high, (delta - high).to(v.dtype)], dim=-1).transpose(0, 1)
    values_and_ones = torch.cat([v, v.new_ones(*v.shape[:2], 2)], dim=-1)
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.zeros_like(states, dtype=torch.float32) for states in (k, v))
    _set_gradients(q, k, values_and_ones, grads, probabilities, *ctx.options, grad_q, grad_k, grad_v)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None, None, None


@torch.library.custom_op("phi3_lightning::set_attention_gradients", mutates_args=("grad_q", "grad_k", "grad_v"))
def _set_gradients(
    q: Tensor,
    k: Tensor,
    values_and_ones: Tensor,
    grads: Tensor,
    probabilities: list[Tensor],
    lengths: list[int],
    shared: list[int],
    scaling: float,
    window: int,
    max_saved_keys: int,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    saved_weights = iter(probabilities)
    for document, blocks, saved in _plan(q, k, lengths, shared, window, max_saved_keys):
        keys, values = document.keys_of(k), document.keys_of(values_and_ones)
        keys_in_full = None if saved else keys.float()
        document_k, document_v = document.gradient_of(grad_k), document.gradient_of(grad_v)
        for block in blocks:
            if keys_in_full is None:
                weights = next(saved_weights)
            else:
                weights = _scores(q, keys_in_full, block, scaling).softmax(-1).to(values.dtype)
            block_grads = block.queries_of(grads)
            document_v[block.heads, block.keys] += torch.bmm(weights.transpose(1, 2), block_grads[..., :-2])
            by_score = torch.bmm(block_grads, values[block.heads, block.keys].transpose(1, 2)).mul_(weights)
            block.write_to(grad_q, _scaled_bmm(by_score, keys[block.heads, block.keys], scaling))
            document_k[block.heads, block.keys] += _scaled_bmm(by_score.transpose(1, 2), block.queries_of(q), scaling)
        document.add_to(grad_k, document_k)
        document.add_to(grad_v, document_v)


@_set_gradients.register_fake
def _set_nothing(*args: Any) -> None:
    """A dry run needs no pass over the blocks, of which a long document has thousands."""


attend_documents.register_autograd(_backward, setup_context=_set_up)
