"""The arithmetic of a LoRA step."""

from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Phi3ForCausalLM

from phi3_lightning.model.activation_checkpointing import mode_of, recomputed_share


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of training, in products with weights; attention's own products are left out."""

    per_token: float
    """For each token of a document."""
    per_supervised_token: float
    """In the head, which runs on supervised positions alone."""


def step_flops(model: Phi3ForCausalLM, extra_forward_passes: int = 0) -> StepFlops:
    """Return the cost of a token: 6N (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361) less what is frozen.

    A frozen weight takes 2 operations in the forward pass and 2 for the gradient of its input, and none for its own; a
    trained one 2 more; gradient checkpointing computes the forward pass again, 2 more, and so does a head that is
    trained or sharded. A forward pass without a gradient, as by a reference, takes 2 for each weight.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and not layer.weight.requires_grad]
    frozen = sum(layer.in_features * layer.out_features for layer in layers)  # bitsandbytes packs what numel counts
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    config = model.config
    recomputed = 2 * recomputed_share(mode_of(model), len(model.model.layers))
    head = config.hidden_size * config.vocab_size
    once = not any(p.requires_grad or isinstance(p, DTensor) for p in model.lm_head.parameters())
    extra = 2 * extra_forward_passes
    per_token = (frozen - head) * (4 + recomputed + extra) + trained * (6 + recomputed + extra)
    return StepFlops(per_token, ((4 if once else 6) + extra) * head)
