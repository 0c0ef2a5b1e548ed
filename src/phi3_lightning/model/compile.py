"""Decoder layers compiled by ``torch.compile`` for training on a GPU.

Between its matrix products a layer is a long row of small kernels: norms, rotary angles, gates, dropout, casts. They
become a few. All layers share one compilation, in which lengths are symbols. Evaluation and generation are not
compiled: without gradients, or with a cache, a layer would be compiled once more for little gain.
"""

from functools import cache
from typing import Any, Literal

import torch
from torch import nn
from transformers import Phi3ForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from phi3_lightning.errors import ConfigError
from phi3_lightning.model import packed_attention
from phi3_lightning.model.activation_checkpointing import mode_of

Compilation = Literal["auto", "layers", "none"]

MIN_COMPILED_MICRO_BATCHES = 500
"""Micro-batches that amortise compilation: half a minute, for a third of each (Phi-3-mini, H200, 4,096 tokens)."""


def choose_compilation(
    model: Phi3ForCausalLM, compilation: Compilation, micro_batches: float, *, dora: bool = False
) -> str:
    """Compile the layers of a model or not, in the present autocast context; return in words what was done, and why.

    Raises:
        ConfigError: If ``layers`` cannot be compiled.
    """
    uncompile_layers(model)
    if compilation == "none":
        return "not compiled"
    kernel = model.config._attn_implementation
    able = kernel == packed_attention.PACKED and packed_attention.takes_varlen(model, model.device)
    by_operator = mode_of(model) == "selective"
    reasons: list[str] = []
    if compilation == "layers":
        if not able:
            raise ConfigError(
                "model.torch_compile: layers needs model.attn_implementation: documents in 16 bits on a GPU since "
                f"Ampere, and this run has {kernel} in {model.dtype} on {model.device.type}; leave it out or set none"
            )
        if by_operator:
            raise ConfigError(
                "model.torch_compile: layers hides the operators that model.gradient_checkpointing: selective looks at "
                "and keeps less by itself; set gradient_checkpointing to none, a number or full"
            )
    else:
        in_full = all(parameter.is_floating_point() for parameter in model.parameters())
        reasons = [
            reason
            for reason, holds in (
                ("each length would be compiled again", not able),
                ("recomputation looks at operators", by_operator),
                ("DoRA's layers break into many graphs", dora),
                ("what it gains over a quantised base is not known", not in_full),
                (
                    f"fewer than {MIN_COMPILED_MICRO_BATCHES} micro-batches do not repay it",
                    micro_batches < MIN_COMPILED_MICRO_BATCHES,
                ),
            )
            if holds
        ]
    if reasons:
        return f"not compiled: {reasons[0]}"
    compile_layers(model)
    return "compiled, for which the first step takes half a minute longer"


def compile_layers(model: Phi3ForCausalLM) -> None:
    """Let the decoder layers run compiled code in training; the first forward pass compiles them.

    A layer changes its class, as in :func:`torch.distributed.fsdp.fully_shard`: what recomputes or gathers it stays
    around the compiled code. ``nn.Module.compile`` would compile hooks too, and evaluation.
    """
    for layer in model.model.layers:
        layer.__class__ = _over(type(layer))  # type: ignore[arg-type]  # mypy: a class is not hashable


def uncompile_layers(model: Phi3ForCausalLM) -> None:
    """Undo :func:`compile_layers`, where it has run."""
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
