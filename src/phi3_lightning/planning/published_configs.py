"""The shapes of the models that Microsoft published, so that a plan for one of them needs no network."""

from pathlib import Path
from typing import Any

from transformers import Phi3Config

_MINI: dict[str, Any] = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": False, "sliding_window": 2047,
    "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
_LONG: dict[str, Any] = _MINI | {"max_position_embeddings": 131072, "sliding_window": 262144}
_MEDIUM: dict[str, Any] = _MINI | {
    "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40,
    "num_key_value_heads": 10,
}  # fmt: skip
_PHI4: dict[str, Any] = _MEDIUM | {"vocab_size": 100352, "sliding_window": None}
_PHI4_MINI: dict[str, Any] = _LONG | {
    "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064, "tie_word_embeddings": True,
    "partial_rotary_factor": 0.75,
}  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "microsoft/Phi-3-mini-4k-instruct": _MINI,
    "microsoft/Phi-3-mini-128k-instruct": _LONG,
    "microsoft/Phi-3.5-mini-instruct": _LONG,
    "microsoft/Phi-3-medium-4k-instruct": _MEDIUM,
    "microsoft/Phi-4-mini-instruct": _PHI4_MINI,
    "microsoft/Phi-4-mini-reasoning": _PHI4_MINI,
    "microsoft/phi-4": _PHI4 | {"max_position_embeddings": 16384, "original_max_position_embeddings": 16384},
    "microsoft/Phi-4-reasoning": _PHI4 | {"max_position_embeddings": 32768, "original_max_position_embeddings": 32768},
}
"""The config.json of each, by its id on the hub, as far as it decides about memory and time. Rotary factors do not."""


def write_config(base: str, folder: Path) -> None:
    """Write the ``config.json`` of one of :data:`PUBLISHED` into a folder."""
    Phi3Config(**PUBLISHED[base], pad_token_id=0).save_pretrained(folder)
