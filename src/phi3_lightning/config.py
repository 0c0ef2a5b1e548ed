"""What the user fills in: frozen dataclasses whose ranges are checked when they are made.

The docstring under a field is its ``--help`` text. Names follow PEFT (LoRA), torch (optimisers) and
transformers (schedules, generation).
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from phi3_lightning.errors import ConfigError

__all__ = ["Generation", "LoRA", "Optimizer", "Schedule"]

PHI3_LINEAR_LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The linear layers of a Phi-3 decoder block; q, k, v and gate, up are fused."""

PHI3_FUSED_LAYERS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What is fused in which of them, in the order of the rows, under Llama's names."""

STRUCTURAL_LORA_KEYS = (
    "backend", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
)  # fmt: skip
"""What of the LoRA section decides which values an adapter has and what they do; dropout and the like may change."""

REFUSED_STARTS = {
    **dict.fromkeys(
        ("pissa", "olora", "corda", "loftq", "lora_ga"), "it rewrites the base weights, which never change"
    ),
    "mica": "it freezes one half of the adapter, and checkpoints hold what is trained",
}
"""Initialisations of PEFT that cannot be used here, and why."""


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise a ConfigError that names ``key`` unless ``condition`` holds.

    Args:
        condition: What must be true of the value.
        key: The key path as the user writes it, for example ``model.lora.r``.
        value: What was given.
        remedy: What to write instead.

    Raises:
        ConfigError: If ``condition`` is false.
    """
    if not condition:
        raise ConfigError(f"{key}: {value!r} cannot be used: {remedy}")


def require_choice(key: str, value: object, kind: Any) -> None:
    """Raise a ConfigError that names ``key`` unless ``value`` is one of the choices of a ``Literal``.

    The command line checks types as well; a script has only this, and a misspelt choice must not pass for another.

    Args:
        key: The key path as the user writes it.
        value: What was given.
        kind: The ``Literal``.

    Raises:
        ConfigError: If ``value`` is no choice.
    """
    choices = get_args(kind)
    valid = any(value == choice and type(value) is type(choice) for choice in choices)
    require(valid, key, value, f"choose {' or '.join(map(str, choices))}")


def require_types(key: str, given: object) -> None:
    """Raise a ConfigError unless each field of a section holds a value of its type, or one of its choices.

    Args:
        key: The key path of the section.
        given: The section, a dataclass.

    Raises:
        ConfigError: If a field holds something else.
    """
    for name, kind in get_type_hints(type(given)).items():
        _require_type(f"{key}.{name}", getattr(given, name), kind)


def _require_type(key: str, value: object, kind: Any) -> None:
    if get_origin(kind) is Literal:
        require_choice(key, value, kind)
    elif get_origin(kind) is dict and isinstance(value, Mapping):
        for name, item in value.items():
            _require_type(f"{key}.{name}", item, get_args(kind)[1])
    else:
        require(_is_of(value, kind), key, value, f"give {_words(kind)}")


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value is of a type, with a whole number for a number, and any sequence or set for a list."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_is_of(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin in (list, tuple):
        return isinstance(value, list | tuple | set) and all(_is_of(item, arguments[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def _words(kind: Any) -> str:
    """A type in the user's words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_words, arguments))
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (list, tuple):
        return f"a list, each of it {_words(arguments[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    return words.get(kind, "a mapping")


Section = TypeVar("Section")

if TYPE_CHECKING:
    Given: TypeAlias = Section | Mapping[str, Any]
    """A section, or a mapping of its keys, as scripts and checkpoints give it."""
else:

    class Given:
        """The section alone: what the command line makes options of."""

        def __class_getitem__(cls, kind):
            return kind


def section(kind: type[Section], given: Section | Mapping[str, Any]) -> Section:
    """Return a section of the configuration that was given as itself or as a mapping, as scripts and checkpoints do.

    Args:
        kind: The dataclass.
        given: An instance, or a mapping of its fields.

    Raises:
        ConfigError: If the mapping has a key that ``kind`` lacks, or a value out of range.
    """
    if isinstance(given, kind):
        return given
    key = f"model.{kind.__name__.lower()}"
    require(isinstance(given, Mapping), key, given, "give a mapping of its options")
    given = cast("Mapping[str, Any]", given)
    known = list(get_type_hints(kind))
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"{key}.{name}: there is no such option; {hint}")
    return kind(**given)


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
    adapter: str | None = None
    """Start from this adapter: a folder or hub id of PEFT's format, a state file of loralib (.pt), or a checkpoint of
    this package (.ckpt). Rank, scale and targets must be those written here."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_types("model.lora", self)
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, list(value))
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

    def _check_expressions(self) -> None:
        written = [("target_modules", self.target_modules), ("exclude_modules", self.exclude_modules)]
        written += [("rank_pattern", key) for key in self.rank_pattern]
        written += [("alpha_pattern", key) for key in self.alpha_pattern]
        for name, expression in written:
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
        twice = start == "eva" and self.adapter is not None
        require(not twice, key, start, "model.lora.adapter brings its own values; leave one of the two out")
        odd = start == "orthogonal" and any(rank % 2 for rank in (self.r, *self.rank_pattern.values()))
        require(not odd, key, start, "it pairs the directions of the adapter, so every rank must be even")

    def _check_backend(self) -> None:
        if self.backend == "peft":
            return
        loralib_has_it = {"use_dora": (False,), "init_lora_weights": (True, "eva"), "modules_to_save": (None,)}
        for name, known in loralib_has_it.items():
            remedy = f"loralib has no such thing; leave it {known[0]!r}, or set model.lora.backend: peft"
            require(getattr(self, name) in known, f"model.lora.{name}", getattr(self, name), remedy)


@dataclass(frozen=True)
class Optimizer:
    """How the adapters are updated."""

    name: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101), or bitsandbytes' with a state of 8 bits
    (https://arxiv.org/abs/2110.02861) that moves out of a GPU whose memory is short; it needs the extra qlora."""
    lr: float = 2.0e-4
    """Highest learning rate of the schedule. LoRA learns at 1e-4 to 5e-4; 5e-6 needs many thousand steps."""
    loraplus_lr_ratio: float = 1.0
    """The B matrices learn this many times as fast as the A matrices: LoRA+ (Hayou et al. 2024,
    https://arxiv.org/abs/2402.12354), which tries 2 to 24 with half the usual lr. 1 is plain LoRA."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running averages of the gradient and of its square."""
    eps: float = 1.0e-8
    """Added to the denominator of the update."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_types("model.optimizer", self)
        object.__setattr__(self, "betas", tuple(self.betas))
        require(self.lr > 0, "model.optimizer.lr", self.lr, "it is above 0, for LoRA often 2e-4")
        require(
            self.loraplus_lr_ratio >= 1,
            "model.optimizer.loraplus_lr_ratio",
            self.loraplus_lr_ratio,
            "it is 1 (plain LoRA) or more",
        )
        require(self.weight_decay >= 0, "model.optimizer.weight_decay", self.weight_decay, "it is 0 or more")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "model.optimizer.betas",
            self.betas,
            "two numbers in [0, 1), often [0.9, 0.999]",
        )
        require(self.eps > 0, "model.optimizer.eps", self.eps, "it is above 0, often 1e-8")


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves over the optimiser steps of the run."""

    name: Literal["linear", "cosine", "constant"] = "cosine"
    """What follows the warm-up: a straight line to 0, half a cosine to 0, or no change."""
    warmup: int | float = 0.03
    """Optimiser steps of linear warm-up: a number (10), or a fraction of the run (0.03), rounded up."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_types("model.schedule", self)
        valid = self.warmup >= 0 if isinstance(self.warmup, int) else 0 <= self.warmup < 1
        require(valid, "model.schedule.warmup", self.warmup, "a whole number of steps, or a fraction in [0, 1)")


@dataclass(frozen=True)
class Generation:
    """How answers are written by ``predict``."""

    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    do_sample: bool = False
    """Draw each token instead of taking the likeliest."""
    temperature: float = 1.0
    """Divides the logits before a token is drawn; needs do_sample."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this share of the probability; needs do_sample."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_types("model.generation", self)
        require(self.max_new_tokens >= 1, "model.generation.max_new_tokens", self.max_new_tokens, "it is at least 1")
        require(self.temperature > 0, "model.generation.temperature", self.temperature, "it is above 0")
        require(0 < self.top_p <= 1, "model.generation.top_p", self.top_p, "it is in (0, 1]")
        sampled = (self.temperature, self.top_p) != (1.0, 1.0)
        require(
            self.do_sample or not sampled,
            "model.generation",
            {"temperature": self.temperature, "top_p": self.top_p},
            "set model.generation.do_sample: true, or leave both at 1.0",
        )
