"""One answer, token by token, and the text of what has come so far."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, Phi3ForCausalLM, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from phi3_lightning.config import Generation

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the first bytes of a character to, before the others have come."""


@torch.inference_mode()
def stream(model: Phi3ForCausalLM, prompt: list[int], stop_ids: list[int], config: Generation) -> Iterator[int]:
    """Yield the tokens of an answer as they are chosen; whoever stops asking stops the model.

    Args:
        model: The model in evaluation mode, with or without adapters.
        prompt: Token ids, fewer than the model's window.
        stop_ids: The tokens that end an answer; the one that does is yielded too.
        config: Length and sampling.

    Yields:
        Token ids, ``config.max_new_tokens`` of them at most, and no more than fit into the window.
    """
    device = model.device
    rope = cast("dict[str, Any]", model.config.rope_parameters)
    # beyond this length longrope reads everything with other factors, what is in the cache as well
    short = rope["original_max_position_embeddings"] if rope["rope_type"] == "longrope" else None
    ids, cached = list(prompt), 0
    room = model.config.max_position_embeddings - len(prompt)
    for _ in range(min(config.max_new_tokens, room)):
        if cached == 0 or (short is not None and cached <= short < len(ids)):
            cache, cached = DynamicCache(config=model.config), 0
        positions = torch.arange(cached, len(ids), device=device)[None]
        new, mask = torch.tensor([ids[cached:]], device=device), torch.ones(1, len(ids), device=device)
        # in place: the cache's name differs between versions of transformers
        output = model(new, mask, positions, cache, use_cache=True, logits_to_keep=1)
        cached = len(ids)
        ids.append(_choose(output.logits[0, -1:], config))
        yield ids[-1]
        if ids[-1] in stop_ids:
            return


def _choose(logits: Tensor, config: Generation) -> int:
    """Choose a token by its logits, shape (1, vocabulary)."""
    if not config.do_sample:
        return int(logits.argmax())
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(config.temperature), TopPLogitsWarper(config.top_p)]
    scores = logits.float()
    for warper in warpers:
        scores = warper(cast("torch.LongTensor", None), cast("torch.FloatTensor", scores))  # no look at earlier tokens
    return int(scores.softmax(-1).multinomial(1))


class Text:
    """The text of an answer that is still coming.

    All of it is decoded again with each token: a token decoded alone loses the space before it.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self.shown = ""
        """What :meth:`add` and :meth:`rest` have returned so far."""

    def add(self, token: int) -> str:
        """Take a token.

        Args:
            token: Its id.

        Returns:
            What is new and will not change any more: no half of a character, and no special token.
        """
        self._ids.append(token)
        text = self._decoded()
        return "" if text.endswith(INCOMPLETE) else self._show(text)

    def rest(self) -> str:
        """Return what was held back, at the end of the answer."""
        return self._show(self._decoded())

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _show(self, text: str) -> str:
        new, self.shown = text[len(self.shown) :], text
        return new
