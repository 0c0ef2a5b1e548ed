"""``model.lora``: the adapter."""

import re
from dataclasses import dataclass, field
from typing import Literal

from phi3_lightning.config.checks import require, require_types

PHI3_LINEAR_LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The linear layers of a Phi-3 decoder block; q, k, v and gate, up are fused."""

PHI3_FUSED_LAYERS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""The slices of the fused layers, in the order of their rows, by Llama's names."""

STRUCTURAL_LORA_KEYS = (
    "backend", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
)  # fmt: skip
"""Options that decide which values an adapter has and how they act; others, such as dropout, may change."""

_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
REFUSED_STARTS = {
    **dict.fromkeys(_REWRITING, "it rewrites the base weights, which never change"),
    "mica": "it freezes one half of the adapter, and checkpoints hold what is trained",
}
"""Initialisations of PEFT that cannot be used here, with the reason."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685), in PEFT's own key names."""

    backend: Literal["peft", "loralib"] = "peft"
    """The library whose layers carry the adapter. 'loralib' adapts the slices of fused layers one by one."""
    r: int = 16
    """Rank of the update: each adapted matrix or slice gets r x (in + out) trainable values."""
    lora_alpha: float = 32
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = 0.05
    """Probability with which an input value of an adapter is dropped in training."""
    target_modules: list[str] | str = PHI3_LINEAR_LAYERS  # type: ignore[assignment]
    """Layers to adapt: their names, Llama's names for the slices of fused layers (with backend 'loralib'),
    'all-linear', or one regular expression that matches whole module paths."""
    exclude_modules: list[str] | str | None = None
    """Layers or slices of the targets that are left alone: names, or one regular expression."""
    enable_lora: dict[str, list[bool]] = field(default_factory=dict)
    """Loralib's way to choose slices: for a fused layer, whether each is adapted: {qkv_proj: [true, false, true]}."""
    layers_to_transform: list[int] | int | None = None
    """Numbers of the decoder blocks to adapt, from 0; null: all."""
    layers_pattern: Literal["layers"] | None = None
    """PEFT's key for the list that layers_to_transform counts in. Phi-3 has one, so there is one value."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks that differ from r: a name or a regular expression for the end of module paths, and the rank."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Values that differ from lora_alpha, as in rank_pattern."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)."""
    use_dora: bool = False
    """Train the length of each row of the adapted matrices too (DoRA, Liu et al. 2024,
    https://arxiv.org/abs/2402.09353); slower, and with backend 'peft' only."""
    init_lora_weights: bool | str = True
    """How the adapter starts: true (changes nothing, as all that follow), 'gaussian', 'orthogonal', or 'eva': the
    directions in which each layer's inputs vary most, found by passes over training batches before the first step
    (Paischer et al. 2024, https://arxiv.org/abs/2410.07170; every layer keeps its rank). false starts from random
    values that do change the answers, for tests. Backend 'loralib' takes true and 'eva'."""
    modules_to_save: list[str] | None = None
    """Modules that are trained whole, as a float32 copy, and kept with the adapter; with backend 'peft' only."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained. No layer of a Phi3ForCausalLM has one, so that anything but 'none' is refused."""
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """PEFT's name of the task, accepted so that a peft_config of a script drops in."""
    init_from: str | None = None
    """Start from this adapter: a folder or hub id (owner/name or owner/name@revision) of PEFT's format, a state file of
    loralib (.pt), or a checkpoint of this package (.ckpt). Rank, scale and targets must be those written here."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_types("model.lora", self)
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, list(value))  # PEFT and checkpoints have sets and tuples
        require(self.r >= 1, "model.lora.r", self.r, "the rank is at least 1")
        require(self.lora_alpha > 0, "model.lora.lora_alpha", self.lora_alpha, "it is above 0, often 2 x r")
        require(0 <= self.lora_dropout < 1, "model.lora.lora_dropout", self.lora_dropout, "it is in [0, 1)")
        require(len(self.target_modules) > 0, "model.lora.target_modules", self.target_modules, "name a layer")
        bias_remedy = "no layer of a Phi3ForCausalLM has a bias to train; leave it none"
        require(self.bias == "none", "model.lora.bias", self.bias, bias_remedy)
        for key, value in self.rank_pattern.items():
            require(value >= 1, f"model.lora.rank_pattern.{key}", value, "the rank is at least 1")
        for key, alpha in self.alpha_pattern.items():
            require(alpha > 0, f"model.lora.alpha_pattern.{key}", alpha, "it is above 0")
        self._check_expressions()
        self._check_enable_lora()
        self._check_start()
        self._check_backend()

    @property
    def starts_with_effect(self) -> bool:
        """Whether the answers change where the adapter is attached, before any training."""
        return self.init_from is not None or self.init_lora_weights is False

    def _check_expressions(self) -> None:
        expressions = [("target_modules", self.target_modules), ("exclude_modules", self.exclude_modules)]
        expressions += [("rank_pattern", key) for key in self.rank_pattern]
        expressions += [("alpha_pattern", key) for key in self.alpha_pattern]
        for name, expression in expressions:
            try:
                re.compile(expression if isinstance(expression, str) else "")
            except re.error as error:
                remedy = f"it is no regular expression ({error}); any text is '.*'"
                require(False, f"model.lora.{name}", expression, remedy)

    def _check_enable_lora(self) -> None:
        for layer, enabled in self.enable_lora.items():
            key = f"model.lora.enable_lora.{layer}"
            require(layer in PHI3_FUSED_LAYERS, key, enabled, f"fused layers are {' and '.join(PHI3_FUSED_LAYERS)}")
            slices = PHI3_FUSED_LAYERS[layer]
            remedy = f"give {len(slices)} values, for {', '.join(slices)}, at least one of them true"
            require(len(enabled) == len(slices) and any(enabled), key, enabled, remedy)

    def _check_start(self) -> None:
        start = self.init_lora_weights
        key = "model.lora.init_lora_weights"
        for name, reason in REFUSED_STARTS.items():
            require(not str(start).startswith(name), key, start, f"{reason}; use true, gaussian, orthogonal or eva")
        known = isinstance(start, bool) or start in ("gaussian", "orthogonal", "eva")
        require(known, key, start, "choose true, gaussian, orthogonal, eva or false")
        twice = start == "eva" and self.init_from is not None
        require(not twice, key, start, "model.lora.init_from brings its own values; leave one of the two out")
        odd = start == "orthogonal" and any(rank % 2 for rank in (self.r, *self.rank_pattern.values()))
        require(not odd, key, start, "it pairs the directions of the adapter, so every rank must be even")

    def _check_backend(self) -> None:
        if self.backend == "peft":
            return
        loralib_has_it = {"use_dora": (False,), "init_lora_weights": (True, "eva"), "modules_to_save": (None,)}
        for name, known in loralib_has_it.items():
            remedy = f"loralib has no such thing; leave it {known[0]!r}, or set model.lora.backend: peft"
            require(getattr(self, name) in known, f"model.lora.{name}", getattr(self, name), remedy)
