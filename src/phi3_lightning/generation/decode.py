"""From prompts to answers over a key-value cache, for batches and for streaming; a finished row costs nothing more.

The loop is our own and not ``model.generate``, which computes finished rows until the last one ends, merges the base's
``generation_config`` into ours, and cuts every row of a batch where its longest prompt reaches the context length.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, Phi3ForCausalLM

from phi3_lightning.batch import PromptBatch
from phi3_lightning.batch.padding import left_pad, unpadded
from phi3_lightning.config import Generation
from phi3_lightning.errors import DataError
from phi3_lightning.generation.sampling import sample
from phi3_lightning.model.packed_attention import PACKED


@torch.inference_mode()
def generate(model: Phi3ForCausalLM, batch: PromptBatch, config: Generation) -> list[list[int]]:
    """Generate one answer for each prompt.

    Greedy answers depend on the batch only through the rounding of its matrix products; adapters stay unmerged.

    Args:
        model: The model, with or without adapters; its own ``generation_config`` is ignored.
        batch: A filler batch, without document ids, gets no answer.

    Returns:
        The token ids of each answer, up to and including the stop token. An answer that was cut at
        ``config.max_new_tokens`` or at the model's context length has no stop token.

    Raises:
        DataError: If a prompt is longer than the model's context length.
    """
    prompts = zip(batch["document_ids"], unpadded(batch), strict=False)
    rows = [_row(model, prompt, config, f"prompt {document_id}") for document_id, prompt in prompts]
    training = model.training
    model.eval()
    try:
        for _ in _Decoder(model, batch["stop_ids"], config, batch["input_ids"].device).steps(rows):
            pass
    finally:
        model.train(training)
    return [row.answer for row in rows]


@torch.inference_mode()
def stream(model: Phi3ForCausalLM, prompt: list[int], stop_ids: list[int], config: Generation) -> Iterator[int]:
    """Yield the tokens of one answer, each computed when it is requested; they are those of :func:`generate`.

    Args:
        model: The model in evaluation mode, with or without adapters.
        stop_ids: The tokens that end an answer; the one that does is yielded too.

    Raises:
        DataError: If the prompt is longer than the model's context length.
    """
    row = _row(model, prompt, config, "the prompt")
    for [token] in _Decoder(model, stop_ids, config, model.device).steps([row]):
        yield token


@dataclass
class _Row:
    """A prompt, its answer so far, and the most tokens that the answer may have."""

    prompt: list[int]
    limit: int
    answer: list[int] = field(default_factory=list)


def _row(model: Phi3ForCausalLM, prompt: list[int], config: Generation, name: str) -> _Row:
    context = model.config.max_position_embeddings
    if len(prompt) > context:
        raise DataError(
            f"{name}: its {len(prompt)} tokens do not fit into the {context} that the model reads; shorten it"
        )
    return _Row(prompt, max(1, min(config.max_new_tokens, context - len(prompt))))


class _Decoder:
    def __init__(self, model: Phi3ForCausalLM, stop_ids: list[int], config: Generation, device: torch.device) -> None:
        self.model = model
        self.config = config
        self.device = device
        self.stop_ids = frozenset(stop_ids)
        rope = cast("dict[str, Any]", model.config.rope_parameters)
        # longrope applies the long factors to a whole batch as soon as one of its rows is beyond this length
        self.short_length = rope["original_max_position_embeddings"] if rope["rope_type"] == "longrope" else None
        # an index copies the states it selects; with a slice, torch's product would copy the whole head for each row
        self.last = torch.tensor([-1], device=device)

    def steps(self, rows: list[_Row]) -> Iterator[list[int]]:
        """Complete the answers of all rows; yield after each step the tokens that it has appended."""
        while rows:
            long = self._is_long(rows[0])
            others = [row for row in rows if self._is_long(row) != long]
            rows = others + (yield from self._decode([row for row in rows if self._is_long(row) == long], long))
        while self._any_rank_decodes(False):  # this rank takes part in the forwards of the others
            self.model(torch.zeros(1, 1, dtype=torch.int64, device=self.device), use_cache=False)

    def _decode(self, rows: list[_Row], long: bool) -> Generator[list[int], None, list[_Row]]:
        """Decode rows together; return the unfinished ones that need longrope's long factors from here on."""
        self._any_rank_decodes(True)
        logits, cache, mask = self._prefill([row.prompt + row.answer for row in rows])
        positions = mask.sum(-1, keepdim=True) - 1
        crossing = []
        while True:
            tokens = sample(logits, self.config)
            ids = tokens.tolist()
            for row, token in zip(rows, ids, strict=True):
                row.answer.append(token)
            yield ids
            unfinished = [index for index, row in enumerate(rows) if not self._is_finished(row)]
            staying = [index for index in unfinished if self._is_long(rows[index]) == long]
            crossing += [rows[index] for index in unfinished if self._is_long(rows[index]) != long]
            if len(staying) < len(rows):
                rows = [rows[index] for index in staying]
                tokens, mask, positions = tokens[staying], mask[staying], positions[staying]
                cache.batch_select_indices(torch.tensor(staying, device=self.device, dtype=torch.int64))
            if not rows:
                return crossing
            positions = positions + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
            self._any_rank_decodes(True)
            logits = self._forward(tokens[:, None], mask, positions, cache)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        # by position: the name of the cache differs between versions of transformers
        output = self.model(ids, mask, positions, cache, use_cache=True, logits_to_keep=self.last)
        return cast("Tensor", output.logits[:, -1])

    def _prefill(self, texts: list[list[int]]) -> tuple[Tensor, DynamicCache, Tensor]:
        """Return the logits after each text, and cache and mask as left-padded texts have them."""
        ids, mask = left_pad(texts, device=self.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        if self.model.config._attn_implementation != PACKED:
            return self._forward(ids, mask, positions, cache), cache, mask
        # packed into one row, so that no padding is computed
        lengths = [len(text) for text in texts]
        real, packed = mask.bool(), DynamicCache()
        options: dict[str, Any] = {"documents": lengths, "use_cache": True}
        no_mask = torch.empty(1, 1, 0, 0, device=self.device)
        output = self.model.model(ids[real][None], no_mask, positions[real][None], packed, **options)
        layers: list[Any] = packed.layers
        for index, layer in enumerate(layers):
            cache.update(_unpack(layer.keys, real), _unpack(layer.values, real), index)
        ends = torch.tensor(lengths, device=self.device).cumsum(-1) - 1
        return self.model.lm_head(output.last_hidden_state[0, ends]), cache, mask

    def _is_finished(self, row: _Row) -> bool:
        return row.answer[-1] in self.stop_ids or len(row.answer) == row.limit

    def _is_long(self, row: _Row) -> bool:
        return self.short_length is not None and len(row.prompt) + len(row.answer) > self.short_length

    def _any_rank_decodes(self, decoding: bool) -> bool:
        """Return before each forward whether any rank has one; ranks that shard a base gather its weights together."""
        if not isinstance(self.model.model, FSDPModule):
            return decoding
        flag = torch.tensor(float(decoding), device=self.device)
        torch.distributed.all_reduce(flag)
        return bool(flag > 0)


def _unpack(states: Tensor, real: Tensor) -> Tensor:
    """Move packed states, shape (1, heads, tokens, size), to where a mask of shape (texts, width) is true."""
    _, heads, _, size = states.shape
    unpacked = states.new_zeros(*real.shape, heads, size)
    unpacked[real] = states[0].transpose(0, 1)
    return unpacked.transpose(1, 2)
