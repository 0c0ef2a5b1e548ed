"""Attention within each document of a batch, without padding and without a mask over the row.

A mask over a packed row of T tokens has T x T entries, and all of them are computed. Attention within one document at a
time costs what the documents cost, however they are packed; padding is never computed at all, and what the answers of a
pair share is computed once. The last query of a document is its last key's token, also where it has fewer queries.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, Phi3Config, Phi3ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from phi3_lightning.batch import Batch
from phi3_lightning.errors import ConfigError
from phi3_lightning.model.document_attention import MAX_SAVED_KEYS, attend_documents, max_saved_keys
from phi3_lightning.model.shared_prompts import ComputedRow, computed_row, with_shared

PACKED = "documents"
"""The name of the kernel, as ``config._attn_implementation`` has it."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    documents: list[int] | None = None,
    shared: list[int] | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int = 0,
    max_length_k: int = 0,
    sources: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each document: an attention function of transformers, which returns (1, tokens, heads, head size).

    Args:
        query: Shape (1, heads, tokens, head size).
        key: Shape (1, key-value heads, tokens, head size).
        attention_mask: Used where no documents are given, as in generation.
        sliding_window: How many tokens back a token sees, itself included; None: all.
        documents: Tokens of each document, which make up the row; attended one after the other.
        shared: Tokens of the document before that each begins with besides; None: none.
        cu_seq_lens_q: Where documents begin and end, int32, shape (documents + 1,); attended by one kernel.
        cu_seq_lens_k: The same in the row of keys.
        sources: The token of the row that each key is of, shape (keys,); None: the keys are those of the row.
    """
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        if sources is not None:
            key, value = (states.index_select(2, sources) for states in (key, value))
        bounds, longest = (cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k)
        return _varlen(query, key, value, bounds, longest, scaling, sliding_window), None
    if documents is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    own_kernel = query.device.type == "cpu" and dropout == 0
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary angles may be in float32
    if own_kernel and (shared is not None or max(documents) <= MAX_SAVED_KEYS):
        return _by_blocks(query, key, value, documents, shared, scaling, sliding_window), None
    queries, keys, values = (states.split(documents, dim=2) for states in (query, key, value))
    if shared is not None:
        keys, values = with_shared(keys, shared), with_shared(values, shared)
    outputs = [
        _attend_one(q, k, v, scaling, dropout, sliding_window) for q, k, v in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scaling: float,
    window: int | None,
) -> Tensor:
    if q.shape[1] != k.shape[1]:  # torch 2.11 takes no groups here
        k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
    q, k, v = (states[0].transpose(0, 1) for states in (q, k, v))
    span = (-1, 0) if window is None or longest[1] <= window else (window - 1, 0)
    out = varlen_attn(q, k, v, *bounds, *longest, scale=scaling, window_size=span)
    return cast("Tensor", out)[None]


def _by_blocks(
    q: Tensor, k: Tensor, v: Tensor, documents: list[int], shared: list[int] | None, scaling: float, window: int | None
) -> Tensor:
    """Attend on a CPU by blocks of products; the result has the shape (1, tokens, heads, head size)."""
    saved = max_saved_keys.get() if torch.is_grad_enabled() else 0
    common = shared or [0] * len(documents)
    output, _ = attend_documents(q[0], k[0], v[0], documents, common, scaling, window or k.shape[2], saved)
    return cast("Tensor", output)[None]


def _attend_one(q: Tensor, k: Tensor, v: Tensor, scaling: float, dropout: float, window: int | None) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    # `is_causal` puts the first query on the first key, and not the last on the last
    causal = queries == keys and (window is None or keys <= window)
    # torch's flash kernel is faster on long documents, unless it needs a mask
    if q.device.type == "cpu" and dropout == 0 and queries == keys and not (causal and keys > MAX_SAVED_KEYS):
        return _by_blocks(q, k, v, [queries], None, scaling, window).transpose(1, 2)
    mask = None if causal else _band(queries, keys, window or keys, q.device)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=grouped
    )


def _band(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """True where a token sees another: not ahead, and less than ``window`` tokens back; the last is in both."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return seen.tril(keys - queries).triu(keys - queries + 1 - window)


AttentionInterface.register(PACKED, attend)
AttentionMaskInterface.register(PACKED, sdpa_mask)  # for generation; batches of documents bring no mask


def one_row(batch: Batch) -> tuple[Tensor, list[int]]:
    """Return the places of a batch's tokens among all of its places, int64, and the documents' lengths.

    A filler batch, which has no document, is one document of padding.
    """
    width = batch["input_ids"].shape[1]
    device = batch["input_ids"].device
    documents = [length for row in batch["document_lengths"] for length in row]
    if not documents:
        return torch.arange(width, device=device), [width]
    rows = [
        torch.arange(sum(row), device=device) + start * width for start, row in enumerate(batch["document_lengths"])
    ]
    return torch.cat(rows), documents


def in_one_row(batch: Batch) -> Batch:
    """Return the same documents one after the other in one row, as most kernels read them."""
    places, documents = one_row(batch)
    return Batch(
        input_ids=batch["input_ids"].flatten()[places][None],
        labels=batch["labels"].flatten()[places][None],
        position_ids=batch["position_ids"].flatten()[places][None],
        document_lengths=[documents],
        document_ids=[[document_id for row in batch["document_ids"] for document_id in row]],
    )


def takes_varlen(model: Phi3ForCausalLM, device: torch.device) -> bool:
    """Return whether torch's flash attention can run: on GPUs since Ampere, in 16 bits, without dropout."""
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in (torch.bfloat16, torch.float16)
        and not (model.training and model.config.attention_dropout)
    )


def describe(model: Phi3ForCausalLM) -> str:
    """Describe how a model attends in training, in the present autocast context."""
    kernel = str(model.config._attn_implementation)
    if kernel != PACKED:
        return kernel
    together = takes_varlen(model, model.device)
    return f"{kernel}, {'all of a batch in one kernel' if together else 'one after the other'}"


def check_lengths(lengths: list[list[int]], config: Phi3Config, base: str) -> None:
    """Refuse documents that are longer than a model's context."""
    longest = max((length for row in lengths for length in row), default=0)
    if longest > config.max_position_embeddings:
        raise ConfigError(
            f"data.max_length: a document has {longest} tokens and {base} reads {config.max_position_embeddings}"
        )


def last_hidden_state(model: Phi3ForCausalLM, batch: Batch) -> Tensor:
    """Return the hidden states before the head, shape (rows, length, hidden size), meaningless on padding.

    Documents do not see each other. Kernels that take documents get them one after the other in one row, without
    padding. The others get the rows, in which transformers finds documents by positions that restart, and a mask.
    """
    kernel = model.config._attn_implementation
    if kernel not in (PACKED, "flash_attention_2"):
        return _run(model, batch["input_ids"], batch["position_ids"])
    places, documents = one_row(batch)
    row = computed_row(batch) if shared_lengths(model, batch) is not None else None
    options = _kernel_options(model, documents, row, places.device) if kernel == PACKED else {}
    computed = places if row is None else row.places
    input_ids, position_ids = (batch[name].flatten()[computed][None] for name in ("input_ids", "position_ids"))
    hidden = _run(model, input_ids, position_ids, **options)[0]
    everywhere = hidden.new_zeros(batch["input_ids"].numel(), hidden.shape[1])
    hidden = hidden if row is None else hidden.index_select(0, row.sources)
    return everywhere.index_copy(0, places, hidden).view(*batch["input_ids"].shape, -1)


def shared_lengths(model: Phi3ForCausalLM, batch: Batch) -> list[list[int]] | None:
    """Return the shared tokens of each document that a model computes once, row by row; None where there are none."""
    shared = batch.get("shared_lengths")
    once = shared is not None and model.config._attn_implementation == PACKED and any(map(any, shared))
    return shared if once else None


def _kernel_options(
    model: Phi3ForCausalLM, documents: list[int], row: ComputedRow | None, device: torch.device
) -> dict[str, Any]:
    """What :func:`attend` gets; a mask of four dimensions is taken as it is, so that none is built."""
    options: dict[str, Any] = {"attention_mask": torch.empty(1, 1, 0, 0, device=device)}
    computed = documents if row is None else row.lengths
    if not takes_varlen(model, device):
        return options | {"documents": computed} | ({} if row is None else {"shared": row.shared})
    bounds = [F.pad(torch.tensor(lengths).cumsum(0, dtype=torch.int32), (1, 0)) for lengths in (computed, documents)]
    return options | {
        "cu_seq_lens_q": bounds[0].to(device),
        "cu_seq_lens_k": bounds[1].to(device),
        "max_length_q": max(computed),
        "max_length_k": max(documents),
        "sources": None if row is None else row.sources,
    }


def _run(model: Phi3ForCausalLM, input_ids: Tensor, position_ids: Tensor, **options: Any) -> Tensor:
    # with a cache, documents would see each other in evaluation
    output = model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **options)
    return cast("Tensor", output.last_hidden_state)
