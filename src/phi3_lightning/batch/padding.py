"""Prompts in a batch: left padding, and the tokens that end an answer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from phi3_lightning.batch.types import PromptBatch


def left_pad(
    prompts: Sequence[Sequence[int]], pad_token_id: int = 0, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``input_ids`` and ``attention_mask`` of at least one prompt, as a ``PromptBatch`` has them."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.int64)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def prompt_batch(
    prompts: Sequence[Sequence[int]],
    document_ids: list[int],
    stop_ids: list[int],
    pad_token_id: int = 0,
    device: torch.device | None = None,
) -> PromptBatch:
    """Collate prompts into a batch; no prompt gives a filler, a prompt without an id."""
    # the filler is not masked: a row without any token has no attention to compute
    input_ids, attention_mask = left_pad(prompts or [[pad_token_id] * 2], pad_token_id, device)
    return PromptBatch(input_ids=input_ids, attention_mask=attention_mask, document_ids=document_ids, stop_ids=stop_ids)


def unpadded(batch: PromptBatch) -> list[list[int]]:
    """Return the token ids of each prompt, without padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def end_of_text_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that end a text: the tokenizer's own, and ``<|endoftext|>``, which Phi-4 has beside its own."""
    added = tokenizer.added_tokens_decoder.items()
    others = [index for index, token in added if token.special and token.content == "<|endoftext|>"]
    own = tokenizer.eos_token_id
    return others if own is None else list(dict.fromkeys([own, *others]))
