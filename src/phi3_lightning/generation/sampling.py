"""From logits to the next token."""

from typing import Any, cast

from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from phi3_lightning.config import Generation


def sample(logits: Tensor, config: Generation) -> Tensor:
    """Choose the next token of each row: the argmax, or with ``do_sample`` a draw from torch's generator.

    ``logits`` are of shape (rows, vocabulary); the token ids are of shape (rows,).
    """
    if not config.do_sample:
        return logits.argmax(-1)
    scores, previous_tokens = logits.float(), cast("Any", None)  # which neither warper reads
    if config.temperature != 1.0:
        scores = TemperatureLogitsWarper(config.temperature)(previous_tokens, scores)
    if config.top_p != 1.0:
        scores = TopPLogitsWarper(config.top_p)(previous_tokens, scores)
    return scores.softmax(-1).multinomial(1).squeeze(-1)
