"""The config.json of each model of the family, with the shapes on the hub and synthetic rotary factors."""


def _config(**own) -> dict:
    fields = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32064,
    }
    return fields | own


def _long(kind: str) -> dict:
    factors = [1.0 + 0.5 * pair for pair in range(48)]
    scaling = {"type": kind, "short_factor": [1.0] * 48, "long_factor": factors}
    return {"max_position_embeddings": 131072, "sliding_window": 262144, "rope_scaling": scaling}


PHI4_MINI = {
    "num_attention_heads": 24, "num_key_value_heads": 8, "partial_rotary_factor": 0.75, "tie_word_embeddings": True,
    "vocab_size": 200064, "bos_token_id": 199999, "eos_token_id": 199999, "pad_token_id": 199999,
}  # fmt: skip

MEDIUM = {
    "hidden_size": 5120, "intermediate_size": 17920, "num_attention_heads": 40, "num_hidden_layers": 40,
    "num_key_value_heads": 10,
}  # fmt: skip


def _phi4(length: int, theta: float) -> dict:
    """As microsoft/phi-4 and Phi-4-reasoning have them; LitGPT's config.py gives the same shapes."""
    tokens = {"vocab_size": 100352, "bos_token_id": 100257, "eos_token_id": 100265, "pad_token_id": 100349}
    lengths = {"max_position_embeddings": length, "original_max_position_embeddings": length}
    return _config(**MEDIUM, **tokens, **lengths, rope_theta=theta, sliding_window=None)


PUBLISHED = {
    "phi3_mini_4k_lora": _config(),
    "phi3_mini_128k_lora": _config(**_long("su")),
    "phi35_mini_lora": _config(**_long("longrope")),
    "phi3_medium_4k_lora": _config(**MEDIUM),
    "phi4_mini_lora": _config(**_long("longrope"), **PHI4_MINI),
    "phi4_mini_reasoning_lora": _config(**_long("longrope"), **PHI4_MINI),
    "phi4_lora": _phi4(16384, 250000.0),
    "phi4_reasoning_lora": _phi4(32768, 500000.0),
}
ALIKE = {"phi4_mini_reasoning_lora": "phi4_mini_lora", "phi4_reasoning_lora": "phi4_lora"}
"""Configurations whose base has the shapes of another's: slow tests run that one."""
DIFFERENT = [name for name in PUBLISHED if name not in ALIKE]
