"""Modules that are trained in full beside the adapter, as float32 copies (PEFT's ``modules_to_save``)."""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Phi3ForCausalLM

from phi3_lightning.adapters.targets import Target, ends_with
from phi3_lightning.config import LoRA
from phi3_lightning.errors import ModelError

KEY = "model.lora.modules_to_save"


def find_modules(model: Phi3ForCausalLM, lora: LoRA, targets: Collection[Target]) -> list[str]:
    """Return the paths of the modules that ``modules_to_save`` names.

    PEFT compares the ends of paths as text, so that ``norm`` would match every ``input_layernorm`` too; here a name
    matches whole components of a path.
    """
    leaves = {path: module for path, module in model.named_modules() if module._parameters}
    paths: list[str] = []
    for name in lora.modules_to_save or []:
        matches = [path for path in leaves if ends_with(path, name)]
        if not matches:
            existing = ", ".join(sorted({path.rpartition(".")[2] for path in leaves}))
            raise ModelError(f"{KEY}: {name} matches no layer; there are {existing}")
        paths += matches
    adapted = {target.path for target in targets}
    for path in paths:
        _check(model, path, leaves[path], adapted)
    return paths


def _check(model: Phi3ForCausalLM, path: str, module: nn.Module, adapted: Collection[str]) -> None:
    if path in adapted:
        raise ModelError(f"{KEY}: {path} carries an adapter; take it from target_modules, or from modules_to_save")
    if model.config.tie_word_embeddings and path in ("lm_head", "model.embed_tokens"):
        raise ModelError(
            f"{KEY}: lm_head and embed_tokens share one weight in this model, and a trained copy of {path} would "
            "separate them; leave it out"
        )
    if not all(parameter.is_floating_point() for parameter in module.parameters()):
        raise ModelError(
            f"{KEY}: {path} is quantised, and only an adapter can be trained on it; "
            "put it into target_modules, or leave model.quantization null"
        )


def in_float32(copy: nn.Module) -> None:
    """Keep a trained copy, which PEFT has made, in float32: hooks cast its input, and its output to the base's type."""
    dtype = next(copy.parameters()).dtype
    copy.float()
    copy.register_forward_pre_hook(_cast_inputs)
    copy.register_forward_hook(partial(_cast_output, dtype))


def _cast_inputs(copy: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if torch.is_autocast_enabled(next(copy.parameters()).device.type):
        return args
    return tuple(arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)


def _cast_output(dtype: torch.dtype, _copy: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.to(dtype)
