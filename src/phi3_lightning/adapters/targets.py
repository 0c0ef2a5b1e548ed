"""From names and expressions of the user to the layers, and slices of layers, of a model."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any, cast

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM

from phi3_lightning.config import LoRA
from phi3_lightning.config.lora import PHI3_FUSED_LAYERS
from phi3_lightning.errors import ModelError


@dataclass(frozen=True)
class Target:
    """One layer that carries an adapter."""

    path: str
    """As ``named_modules`` gives it."""
    slices: dict[str, int]
    """Name and rows of each matrix in the layer that has a LoRA delta of its own; PEFT gives one to the full layer."""
    enabled: tuple[bool, ...]
    """Whether each slice is adapted."""
    r: int
    """Rank of each slice's LoRA delta."""
    scaling: float
    """Factor of the LoRA delta."""

    @property
    def name(self) -> str:
        """Name of the layer, without its path."""
        return _name(self.path)

    @property
    def embedding(self) -> bool:
        """Whether it is the embedding and no linear layer."""
        return self.name == "embed_tokens"

    @property
    def adapted(self) -> dict[str, int]:
        """Name and rows of each slice that is adapted."""
        return {name: rows for (name, rows), on in zip(self.slices.items(), self.enabled, strict=True) if on}


def resolve(model: Phi3ForCausalLM, lora: LoRA) -> list[Target]:
    """Return the layers and slices that a LoRA section names, in the order of ``named_modules``.

    Args:
        lora: The section. Names of layers and of slices match the ends of paths; an expression matches whole paths.

    Raises:
        ModelError: If a name matches nothing, a target lies inside another, or a match cannot carry an adapter.
    """
    parts = _parts(model, lora)
    named = _named(parts, lora)
    if model.config.tie_word_embeddings and any(_name(part.layer) == "lm_head" for part in named):
        raise ModelError(
            "model.lora.target_modules: lm_head shares its weight with embed_tokens in this model, "
            "and an adapter on one would not be on the other; leave lm_head out"
        )
    excluded = _excluded(named, lora)
    chosen: dict[str, set[str]] = {}
    for part in named:
        if part not in excluded:
            chosen.setdefault(part.layer, set()).add(part.slice)
    if not chosen:
        raise ModelError(f"model.lora.exclude_modules: {lora.exclude_modules} leaves no target; exclude less")
    _check_enable_lora(chosen, lora)
    targets = [_target(model, path, slices, lora) for path, slices in chosen.items()]
    _check_patterns(targets, lora)
    return targets


@dataclass(frozen=True)
class _Part:
    """What a name may match: a slice of a fused layer, or all of another layer."""

    layer: str
    """Path of the layer."""
    slice: str
    """Name of the slice; the name of the layer where nothing is fused."""

    @property
    def path(self) -> str:
        """Path that the slice has in a Llama model."""
        return f"{self.layer.removesuffix(_name(self.layer))}{self.slice}"


def _parts(model: nn.Module, lora: LoRA) -> list[_Part]:
    """Every part of the model that can carry an adapter, in the chosen blocks."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    chosen = lora.layers_to_transform
    if chosen is not None:
        blocks = [chosen] if isinstance(chosen, int) else chosen
        existing = sorted({int(number) for name in layers for number in re.findall(r"\.layers\.(\d+)\.", name)})
        if absent := [number for number in blocks if number not in existing]:
            raise ModelError(
                f"model.lora.layers_to_transform: there is no block {', '.join(map(str, absent))}; "
                f"they are {existing[0]} to {existing[-1]}"
            )
        layers = [name for name in layers if any(f".layers.{number}." in name for number in blocks)]
    return [_Part(name, part) for name in layers for part in PHI3_FUSED_LAYERS.get(_name(name), (_name(name),))]


def _named(parts: list[_Part], lora: LoRA) -> list[_Part]:
    """The parts that ``target_modules`` names."""
    names = lora.target_modules
    if names == "all-linear":
        return [part for part in parts if ".layers." in part.layer]
    named = _select("target_modules", names, parts)
    for part in [] if isinstance(names, str) else parts:
        by_slice = next((name for name in names if ends_with(part.path, name) and part.path != part.layer), None)
        by_layer = next((name for name in names if ends_with(part.layer, name)), None)
        if by_slice and by_layer:
            raise ModelError(f"model.lora.target_modules: {by_slice} is a slice of {by_layer}; name one of them")
    return named


def _excluded(named: list[_Part], lora: LoRA) -> set[_Part]:
    """The parts among ``named`` that ``exclude_modules`` or ``enable_lora`` leaves out."""
    excluded = set(_select("exclude_modules", lora.exclude_modules or [], named))
    for part in named:
        enabled = lora.enable_lora.get(_name(part.layer))
        if enabled and not enabled[PHI3_FUSED_LAYERS[_name(part.layer)].index(part.slice)]:
            excluded.add(part)
    return excluded


def _select(key: str, names: str | list[str], parts: list[_Part]) -> list[_Part]:
    """The parts that an expression or a list of names matches, each of which has to match one."""
    match = _matches if isinstance(names, str) else _stands_for
    expressions = [names] if isinstance(names, str) else names
    if unmatched := [name for name in expressions if not any(match(name, part) for part in parts)]:
        existing = sorted({_name(part.layer) for part in parts})
        slices = sorted({part.slice for part in parts} - set(existing))
        message = f"model.lora.{key}: {', '.join(unmatched)} matches no layer; there are {', '.join(existing)}"
        message += f", and the slices {', '.join(slices)}" if slices else ""
        raise ModelError(f"{message}. A list holds names, a single value is an expression for whole paths")
    return [part for part in parts if any(match(name, part) for name in expressions)]


def _target(model: Phi3ForCausalLM, path: str, names: set[str], lora: LoRA) -> Target:
    slices = _slices(model.get_submodule(path), _name(path), model.config)
    if lora.backend == "peft":
        if absent := slices.keys() - names:
            raise ModelError(
                f"model.lora.target_modules: {_name(path)} would be adapted without {', '.join(sorted(absent))}, and "
                f"backend peft adapts it as one matrix; set model.lora.backend: loralib, or name {_name(path)}"
            )
        slices = {_name(path): sum(slices.values())}
        names = set(slices)
    r, scaling = rank_and_scaling(lora, path)
    return Target(path, slices, tuple(name in names for name in slices), r, scaling)


def rank_and_scaling(config: LoRA | LoraConfig, path: str) -> tuple[int, float]:
    """Return rank and factor of a layer's LoRA delta, by the patterns of a section or of PEFT's configuration."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    r = ranks.get(get_pattern_key(list(ranks), path), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), path), config.lora_alpha)
    return r, float(alpha / math.sqrt(r) if config.use_rslora else alpha / r)


def fused(model: Phi3ForCausalLM, target: Target) -> dict[str, int]:
    """Return name and rows of each matrix in a layer, also where one LoRA delta is that of all of them."""
    if target.name not in PHI3_FUSED_LAYERS:
        return target.slices
    return _slices(model.get_submodule(target.path), target.name, model.config)


def _slices(layer: nn.Module, name: str, config: Phi3Config) -> dict[str, int]:
    """Name and rows of each slice; there may be fewer key-value heads than query heads."""
    head = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    keys, inner = cast("int", config.num_key_value_heads) * head, config.intermediate_size
    rows = {"qkv_proj": (config.num_attention_heads * head, keys, keys), "gate_up_proj": (inner, inner)}
    if name in rows:
        return dict(zip(PHI3_FUSED_LAYERS[name], rows[name], strict=True))
    return {name: layer.embedding_dim if isinstance(layer, nn.Embedding) else cast("nn.Linear", layer).out_features}


def _check_patterns(targets: list[Target], lora: LoRA) -> None:
    for key, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        keys = {get_pattern_key(list(pattern), target.path) for target in targets}
        if unused := [name for name in pattern if name not in keys]:
            layers = ", ".join(sorted({target.name for target in targets}))
            raise ModelError(f"model.lora.{key}: {', '.join(unused)} matches no target; adapted are {layers}")


def _check_enable_lora(chosen: dict[str, set[str]], lora: LoRA) -> None:
    for layer, enabled in lora.enable_lora.items():
        expected = {name for name, on in zip(PHI3_FUSED_LAYERS[layer], enabled, strict=True) if on}
        slices = [names for path, names in chosen.items() if _name(path) == layer]
        if not slices or any(names != expected for names in slices):
            raise ModelError(
                f"model.lora.enable_lora.{layer}: {enabled} enables {', '.join(sorted(expected))}, and target_modules "
                f"and exclude_modules say otherwise; name {layer} as a target, or leave enable_lora.{layer} out"
            )


def _matches(expression: str, part: _Part) -> bool:
    return bool(re.fullmatch(expression, part.layer) or re.fullmatch(expression, part.path))


def _stands_for(name: str, part: _Part) -> bool:
    return ends_with(part.layer, name) or ends_with(part.path, name)


def ends_with(path: str, name: str) -> bool:
    """Whether ``name`` is a path, or its end after a dot."""
    return path == name or path.endswith(f".{name}")


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def describe_adapter(lora: LoRA, targets: Collection[Target]) -> dict[str, Any]:
    """Return an adapter as a checkpoint's identity block holds it: its section, its slices and its layers by name."""
    # shapes alone do not tell a k_proj from a v_proj
    slices = {target.path: list(target.adapted) for target in targets if not all(target.enabled)}
    return {"lora": {**asdict(lora), "slices": slices}, "layers": Counter(target.name for target in targets)}


def short_names(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Return the shortest names for ``paths``: a layer's own where ``paths`` has all such layers."""
    paths = list(paths)
    kinds: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            kinds.setdefault(_name(name), []).append(name)
    return list(dict.fromkeys(_name(p) if set(kinds.get(_name(p), [p, ""])) <= set(paths) else p for p in paths))
