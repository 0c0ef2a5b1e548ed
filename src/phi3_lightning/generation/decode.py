"""From prompts to answers: batches decode over a key-value cache, and a row that has ended costs nothing more.

The loop is our own and not ``model.generate``, which computes ended rows until the last one ends, lets the base's
``generation_config`` decide along with ours, and cuts every row of a batch where its longest prompt meets the window.
"""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, Phi3ForCausalLM
from transformers.generation.logits_process import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from phi3_lightning.batch import PromptBatch
from phi3_lightning.batch.padding import left_pad, unpadded
from phi3_lightning.config import Generation
from phi3_lightning.errors import DataError
from phi3_lightning.model.packed_attention import PACKED


@torch.inference_mode()
def generate(model: Phi3ForCausalLM, batch: PromptBatch, config: Generation) -> list[list[int]]:
    """Generate one answer a prompt.

    Greedy answers depend on the batch only through the rounding of its matrix products; adapters stay unmerged.

    Args:
        model: The model, with or without adapters. Its own ``generation_config`` is not looked at.
        batch: Left-padded prompts; ``stop_ids`` end an answer. A filler batch, without row ids, gets no answer.
        config: Length and sampling.

    Returns:
        The token ids of each answer, up to and including the stop token; without one where the answer was cut at
        ``config.max_new_tokens``, or at the model's window.

    Raises:
        DataError: A prompt does not fit into the model's window.
    """
    window = model.config.max_position_embeddings
    rows = []
    for document_id, prompt in zip(batch["document_ids"], unpadded(batch), strict=False):
        if len(prompt) > window:
            raise DataError(
                f"prompt {document_id}: its {len(prompt)} tokens do not fit into the {window} that the model reads; "
                "shorten it"
            )
        rows.append(_Row(prompt, max(1, min(config.max_new_tokens, window - len(prompt)))))
    training = model.training
    model.eval()
    try:
        _Decoder(model, batch["stop_ids"], config, batch["input_ids"].device).run(rows)
    finally:
        model.train(training)
    return [row.answer for row in rows]


def _spread(states: Tensor, seen: Tensor) -> Tensor:
    """Lay out the states of texts in one row, (1, heads, tokens, size), where a mask of (texts, width) is true."""
    _, heads, _, size = states.shape
    spread = states.new_zeros(*seen.shape, heads, size)
    spread[seen] = states[0].transpose(0, 1)
    return spread.transpose(1, 2)


@dataclass
class _Row:
    """A prompt, how long its answer may be, and the answer so far."""

    prompt: list[int]
    room: int
    answer: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


class _Decoder:
    def __init__(self, model: Phi3ForCausalLM, stop_ids: list[int], config: Generation, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.stop_ids = frozenset(stop_ids)
        rope = cast("dict[str, Any]", model.config.rope_parameters)
        # longrope reads all of a batch with the long factors as soon as one of its rows is beyond this length
        self.short = rope["original_max_position_embeddings"] if rope["rope_type"] == "longrope" else None
        # an index copies what it picks; of a slice, torch's product would copy the whole head once a row
        self.last = torch.tensor([-1], device=device)
        self.do_sample = config.do_sample
        self.warpers: list[LogitsProcessor] = []
        if config.temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(config.temperature))
        if config.top_p != 1.0:
            self.warpers.append(TopPLogitsWarper(config.top_p))

    def run(self, rows: list[_Row]) -> None:
        """Answer all rows."""
        waiting = rows
        while waiting:
            side = self._long(waiting[0])
            group = [row for row in waiting if self._long(row) == side]
            waiting = [row for row in waiting if self._long(row) != side] + self._decode(group)
        while self._any_rank_decodes(False):
            self._run_along()

    def _decode(self, rows: list[_Row]) -> list[_Row]:
        """Answer rows together; return those that have to be read again, with longrope's long factors."""
        self._any_rank_decodes(True)
        logits, cache, mask = self._read([row.prompt + row.answer for row in rows])
        positions = mask.sum(-1, keepdim=True) - 1
        side, crossed = self._long(rows[0]), []
        while True:
            chosen = self._choose(logits)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                row.answer.append(token)
            going = [index for index, row in enumerate(rows) if not self._ended(row)]
            kept = [index for index in going if self._long(rows[index]) == side]
            crossed += [rows[index] for index in going if self._long(rows[index]) != side]
            if len(kept) < len(rows):
                rows = [rows[index] for index in kept]
                chosen, mask, positions = chosen[kept], mask[kept], positions[kept]
                cache.batch_select_indices(torch.tensor(kept, device=self.device, dtype=torch.int64))
            if not rows:
                return crossed
            positions = positions + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
            self._any_rank_decodes(True)
            logits = self._forward(chosen[:, None], mask, positions, cache)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        # by position: the cache's name differs between versions of transformers
        output = self.model(ids, mask, positions, cache, use_cache=True, logits_to_keep=self.last)
        return cast("Tensor", output.logits[:, -1])

    def _read(self, texts: list[list[int]]) -> tuple[Tensor, DynamicCache, Tensor]:
        """Read texts; return the logits after each, and cache and mask as if they had been padded on the left."""
        ids, mask = left_pad(texts, device=self.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        if self.model.config._attn_implementation != PACKED:
            return self._forward(ids, mask, positions, cache), cache, mask
        # one after the other in one row, where no padding is computed
        lengths = [len(text) for text in texts]
        seen, packed = mask.bool(), DynamicCache()
        options: dict[str, Any] = {"documents": lengths, "use_cache": True}
        no_mask = torch.empty(1, 1, 0, 0, device=self.device)
        output = self.model.model(ids[seen][None], no_mask, positions[seen][None], packed, **options)
        layers: list[Any] = packed.layers
        for index, layer in enumerate(layers):
            cache.update(_spread(layer.keys, seen), _spread(layer.values, seen), index)
        ends = torch.tensor(lengths, device=self.device).cumsum(-1) - 1
        return self.model.lm_head(output.last_hidden_state[0, ends]), cache, mask

    def _choose(self, logits: Tensor) -> Tensor:
        if not self.do_sample:
            return logits.argmax(-1)
        scores, tokens_so_far = logits.float(), cast("Any", None)  # which none of these looks at
        for warper in self.warpers:
            scores = warper(tokens_so_far, scores)
        return scores.softmax(-1).multinomial(1).squeeze(-1)

    def _ended(self, row: _Row) -> bool:
        return row.answer[-1] in self.stop_ids or len(row.answer) == row.room

    def _long(self, row: _Row) -> bool:
        return self.short is not None and row.length > self.short

    def _any_rank_decodes(self, decoding: bool) -> bool:
        """Say, before each forward, whether this rank has one; ranks that share a base gather its weights together."""
        if not isinstance(self.model.model, FSDPModule):
            return decoding
        flag = torch.tensor(float(decoding), device=self.device)
        torch.distributed.all_reduce(flag)
        return bool(flag > 0)

    def _run_along(self) -> None:
        """Gather the weights that another rank needs."""
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self.model(ids, use_cache=False)
