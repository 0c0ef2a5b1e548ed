"""Who runs, and with which settings: the one page to change."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """A library with settings.

    Args:
        name: As the table shows it.
        runner: The module of this package that runs it.
        environment: The peers' environment that it needs; None: the one this package is installed in.
        options: What the runner is given.
        trains: Whose tokens are trained.
        gpu_only: Whether it needs CUDA.
    """

    name: str
    runner: str
    environment: str | None
    options: dict[str, Any] = field(default_factory=dict)
    trains: str = "assistant"
    gpu_only: bool = False


OURS: dict[str, dict[str, str]] = {
    "phi3_lightning": {"gradient_checkpointing": "none"},
    "phi3_lightning, checkpointing": {"gradient_checkpointing": "full"},
}
OURS_ON_A_GPU = {f"{name}, compiled": {**options, "torch_compile": "layers"} for name, options in OURS.items()}
"""Settings of this package beside its defaults: arguments of the module. By itself, so short a run is not compiled."""

TRL_BEST = {"packing": True, "gradient_checkpointing": False, "assistant_only": True}
"""TRL's head computes chunks of logits by default; Liger's, of ``use_liger_kernel``, takes its place."""
PACKED = {"packing": True, "disable_gradient_checkpointing": True}

CONTENDERS = [
    *(Contender(name, "ours", None, {"model": options}) for name, options in OURS.items()),
    *(Contender(name, "ours", None, {"model": options}, gpu_only=True) for name, options in OURS_ON_A_GPU.items()),
    Contender("TRL, defaults", "trl_sft", "trl", {"assistant_only": False}, trains="all"),
    Contender("TRL, packed, no checkpointing", "trl_sft", "trl", TRL_BEST),
    Contender("TRL, packed, Liger", "trl_sft", "trl", {**TRL_BEST, "use_liger_kernel": True}, gpu_only=True),
    Contender("Unsloth", "unsloth_sft", "unsloth", TRL_BEST, gpu_only=True),
    Contender("LLaMA-Factory, defaults", "llamafactory_sft", "llamafactory"),
    Contender("LLaMA-Factory, packed, no checkpointing", "llamafactory_sft", "llamafactory", PACKED),
    Contender(
        "LLaMA-Factory, neat packing, no checkpointing", "llamafactory_sft", "llamafactory",
        {**PACKED, "neat_packing": True},
    ),
    Contender("LitGPT", "litgpt_lora", "litgpt"),
    Contender("transformers + peft, checkpointing", "plain", None, {"checkpointing": True}),
    Contender("transformers + peft", "plain", None, {"checkpointing": False}),
]  # fmt: skip
