"""What a layer's forward pass keeps for its backward pass, and what is recomputed.

See Chen et al. 2016, https://arxiv.org/abs/1604.06174.
"""

from functools import partial
from typing import Any, Final, Literal

import torch
import torch.nn.attention.varlen  # registers the last operator below
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import Phi3ForCausalLM

from phi3_lightning.config.checks import require, require_choice
from phi3_lightning.model import int8_dynamic

CheckpointingMode = Literal["none", "selective", "full", "offload"]
ModeName = Literal["auto", "none", "selective", "full", "offload"]
Checkpointing = ModeName | int

SAVED_OPERATORS: Final = [
    torch.ops.aten.mm.default,
    int8_dynamic.LINEAR,
    torch.ops.phi3_lightning.attend_documents.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
]
"""Operators whose results ``selective`` keeps: products with a matrix, and attention by a kernel (Korthikanti et al.
2022, https://arxiv.org/abs/2205.05198, keep and recompute by operator). An adapter's second product is an ``addmm``: a
result as large as that of the layer for next to no work, which is not kept."""


def check(mode: object) -> None:
    """Refuse a value that is not a checkpointing mode."""
    if isinstance(mode, int) and not isinstance(mode, bool):
        remedy = "a number says that every so many layers one is recomputed; give 2 or more, or full for each of them"
        require(mode >= 2, "model.gradient_checkpointing", mode, remedy)
    else:
        require_choice("model.gradient_checkpointing", mode, ModeName)


def check_device(mode: Checkpointing, device_type: str) -> None:
    """Refuse ``offload`` on a CPU."""
    require(
        mode != "offload" or device_type == "cuda",
        "model.gradient_checkpointing",
        mode,
        "a CPU keeps everything in the host's memory anyway; use full",
    )


def _full(function: Any, *args: Any) -> Any:
    # the reentrant variant gives no gradient where the input needs none
    return checkpoint(function, *args, use_reentrant=False)


def _selective(function: Any, *args: Any) -> Any:
    context = partial(create_selective_checkpoint_contexts, SAVED_OPERATORS)
    return checkpoint(function, *args, use_reentrant=False, context_fn=context)


def _offloaded(function: Any, *args: Any) -> Any:
    with save_on_cpu(pin_memory=True):  # takes the layer's input alone: what is within is recomputed
        return checkpoint(function, *args, use_reentrant=False)


def checkpoint_activations(model: Phi3ForCausalLM, mode: CheckpointingMode | int) -> None:
    """Set what the layers keep in training mode; the last call counts.

    Args:
        mode: ``none`` keeps everything; ``selective`` what :data:`SAVED_OPERATORS` computes; ``full`` one hidden state
            a layer, and ``offload`` the same in the host's memory; a number n recomputes every n-th layer.
    """
    every = mode if isinstance(mode, int) else 1
    for index, layer in enumerate(model.model.layers):
        # as transformers' own activation_checkpointing_enable does it, which no release before 5.20 has
        layer.gradient_checkpointing = mode != "none" and index % every == 0
        layer._gradient_checkpointing_func = {"selective": _selective, "offload": _offloaded}.get(str(mode), _full)


def mode_of(model: Phi3ForCausalLM) -> CheckpointingMode | int:
    """Return the mode that :func:`checkpoint_activations` has set."""
    recomputed = [index for index, layer in enumerate(model.model.layers) if layer.gradient_checkpointing]
    if not recomputed:
        return "none"
    function = model.model.layers[0]._gradient_checkpointing_func
    if function is not _full:
        return "selective" if function is _selective else "offload"
    if len(recomputed) == len(model.model.layers):
        return "full"
    return recomputed[1] if len(recomputed) > 1 else len(model.model.layers)


def recomputed_share(mode: CheckpointingMode | int, depth: int) -> float:
    """Return the share of the layers whose products are computed once more in the backward pass."""
    if isinstance(mode, int):
        return len(range(0, depth, mode)) / depth
    return 0.0 if mode in ("none", "selective") else 1.0
