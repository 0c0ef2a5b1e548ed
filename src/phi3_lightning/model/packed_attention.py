"""Attention within each document of a batch, without padding and without a mask over the row.

A mask over a packed row of T tokens has T x T entries, and all of them are computed. Attention within one document at a
time costs what the documents cost, however they are packed; padding is never computed at all.
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

PACKED = "documents"
"""The name of the kernel, as ``config._attn_implementation`` has it."""

SHORT_DOCUMENT_TOKENS = 256
"""Longest document, in tokens, for which a CPU is faster by plain products: the backward pass of its flash kernel takes
three times as long on documents of 128 tokens."""


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
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each document: an attention function of transformers, which returns (1, tokens, heads, head size).

    Args:
        query: Shape (1, heads, tokens, head size).
        key: Shape (1, key-value heads, tokens, head size).
        attention_mask: Used where no documents are given, as in generation.
        sliding_window: How many tokens back a token sees, itself included; None: all.
        documents: Tokens of each document, which make up the row; attended one after the other.
        cu_seq_lens_q: Where documents begin and end, int32, shape (documents + 1,); attended by one kernel.
    """
    if cu_seq_lens_q is not None:
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    if documents is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    outputs = [
        _attend_one(q, k, v, scaling, dropout, sliding_window)
        for q, k, v in zip(*(states.split(documents, dim=2) for states in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scaling: float, window: int | None
) -> Tensor:
    if q.shape[1] != k.shape[1]:  # torch 2.11 takes no groups here
        k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
    q, k, v = (states[0].transpose(0, 1) for states in (q, k, v))
    span = (-1, 0) if window is None or longest <= window else (window - 1, 0)
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=span)
    return cast("Tensor", out)[None]


def _attend_one(q: Tensor, k: Tensor, v: Tensor, scaling: float, dropout: float, window: int | None) -> Tensor:
    length = q.shape[2]
    all_seen = window is None or length <= window
    if q.device.type == "cpu" and length <= SHORT_DOCUMENT_TOKENS and all_seen and dropout == 0:
        return _products(q[0], k[0], v[0], scaling)[None]
    mask = None if all_seen else _band(length, cast("int", window), q.device)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


class _Scores(torch.autograd.Function):
    """Products of queries and keys in float32, and their gradients in the type of these, as flash kernels have them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, future: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.scaling = scaling
        return torch.baddbmm(future, q.float(), k.float().transpose(1, 2), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, k = ctx.saved_tensors
        grad = (grad * ctx.scaling).to(q.dtype)
        return grad @ k, grad.transpose(1, 2) @ q, None, None


def _products(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Causal attention by two products a head; scores and their softmax in float32, as flash kernels have them."""
    heads, length, size = q.shape
    grouped = q.reshape(len(k), heads // len(k) * length, size)
    future = torch.full((length, length), float("-inf"), dtype=torch.float32, device=q.device).triu_(1)
    with torch.autocast(q.device.type, enabled=False):
        scores: Tensor = _Scores.apply(grouped, k, future.repeat(heads // len(k), 1), scaling)  # type: ignore[no-untyped-call]
        return (scores.softmax(-1).to(v.dtype) @ v).view(heads, length, size)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """True where a token sees another: not ahead, and less than ``window`` tokens back."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device)
    return seen.tril().triu(1 - window)


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
    options: dict[str, Any] = {}
    if kernel == PACKED:  # a mask of four dimensions is taken as it is: none is built
        options["attention_mask"] = torch.empty(1, 1, 0, 0, device=places.device)
        if takes_varlen(model, places.device):
            bounds = F.pad(torch.tensor(documents).cumsum(0, dtype=torch.int32), (1, 0))
            options |= {"cu_seq_lens_q": bounds.to(places.device), "max_length_q": max(documents)}
        else:
            options["documents"] = documents
    input_ids, position_ids = (batch[name].flatten()[places][None] for name in ("input_ids", "position_ids"))
    hidden = _run(model, input_ids, position_ids, **options)[0]
    everywhere = hidden.new_zeros(batch["input_ids"].numel(), hidden.shape[1])
    return everywhere.index_copy(0, places, hidden).view(*batch["input_ids"].shape, -1)


def _run(model: Phi3ForCausalLM, input_ids: Tensor, position_ids: Tensor, **options: Any) -> Tensor:
    # with a cache, documents would see each other in evaluation
    output = model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **options)
    return cast("Tensor", output.last_hidden_state)
