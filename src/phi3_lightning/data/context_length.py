"""How long a model's inputs may be, read from its config.json."""

from typing import NamedTuple

from transformers import PretrainedConfig


class ContextLength(NamedTuple):
    """The positions that a model supports."""

    longest: int
    """Tokens of the longest input."""
    short: int | None
    """Tokens up to which a longrope model uses its short factors; None for other models."""


def read_context_length(name: str, revision: str | None = None) -> ContextLength | None:
    """Read the context length from the config.json beside a tokenizer; None where no config.json has one."""
    try:
        config, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    except OSError:
        return None
    if "max_position_embeddings" not in config:
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # the first 128k models call longrope `su`
    long = rope.get("rope_type", rope.get("type")) in {"longrope", "su"}
    short = rope.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    return ContextLength(config["max_position_embeddings"], short if long else None)
