"""Decoder layers compiled by ``torch.compile`` for training on a GPU.

Between its matrix products a layer is a long row of small kernels: norms, rotary angles, gates, dropout, casts. They
become a few. All layers share one compilation, in which lengths are symbols. Evaluation and generation stay as they
are: without gradients, or with a cache, a layer would be compiled once more for little.
"""

from functools import cache
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import Phi3ForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from phi3_lightning.errors import ConfigError
from phi3_lightning.model import documents

Compilation = Literal["auto", "layers", "none"]

PAYS_FROM = 500
"""Micro-batches that win compiling back: half a minute, for a third of each (Phi-3-mini on an H200, 4,096 tokens)."""


def prepare(model: Phi3ForCausalLM, wanted: Compilation, micro_batches: float) -> None:
    """Compile the layers of a model, or not, for a run in the present autocast context.

    Args:
        model: The model, where it will be trained.
        wanted: What the user wrote.
        micro_batches: How many the run has.

    Raises:
        ConfigError: If compiled layers are asked for where each batch would be compiled anew.
    """
    uncompile_layers(model)
    if wanted == "none":
        return
    kernel = model.config._attn_implementation
    able = kernel == documents.DOCUMENTS and documents.takes_varlen(model, model.device)
    if wanted == "layers" and not able:
        raise ConfigError(
            "model.compile: layers needs model.attn_implementation: documents in 16 bits on a GPU since Ampere, and "
            f"this run has {kernel} in {model.dtype} on {model.device.type}; leave it out, or set it to none"
        )
    in_full = all(parameter.is_floating_point() for parameter in model.parameters())  # else the gain is not known
    if able and (wanted == "layers" or (in_full and micro_batches >= PAYS_FROM)):
        rank_zero_info("the decoder layers are compiled for training: the first step takes half a minute longer")
        compile_layers(model)


def compile_layers(model: Phi3ForCausalLM) -> None:
    """Let the decoder layers run compiled code in training; they are compiled when they first run.

    A layer changes its class, as :func:`torch.distributed.fsdp.fully_shard` does it: what recomputes or gathers a layer
    stays around the compiled code.

    Args:
        model: The model.
    """
    for layer in model.model.layers:
        layer.__class__ = _over(type(layer))  # type: ignore[arg-type]  # mypy: a class is not hashable


def uncompile_layers(model: Phi3ForCausalLM) -> None:
    """Undo :func:`compile_layers`; does nothing where there is nothing to undo.

    Args:
        model: The model.
    """
    for layer in model.model.layers:
        if isinstance(layer, _Compiled):
            layer.__class__ = type(layer).__bases__[1]


class _Compiled(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = _compiled() if self.training and torch.is_grad_enabled() else Phi3DecoderLayer.forward
        return run(self, *args, **kwargs)


@cache
def _over(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Compiled{kind.__name__}", (_Compiled, kind), {})


@cache
def _compiled() -> Any:
    return torch.compile(Phi3DecoderLayer.forward, dynamic=True)
