"""The FLOPs of a step by the formula are those that torch counts."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.model.flops import step_flops


class Count(TorchDispatchMode):
    """Counts as torch's FlopCounterMode does, but without its module hooks, which fail on a backward pass inside."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if (kind := func.overloadpacket) in flop_registry:
            self.products[kind] += flop_registry[kind](*args, **kwargs or {}, out_val=out)
        return out


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("backend", ["peft", "loralib"])
def test_the_formula_is_what_torch_counts(tiny_base, checkpointing, backend):
    """The count covers all products with weights of a forward and backward pass, without attention's."""
    lora = {"r": 4, "lora_dropout": 0.0, "backend": backend}
    module = Phi3LoRAModule(tiny_base, dtype="float32", lora=lora, gradient_checkpointing=checkpointing)
    synthetic.randomised(module)
    module.model.train()
    length = 12
    batch = synthetic.batch_of([[synthetic.document(length, length - 1, 0)]])
    with Count() as counter:
        loss, count = module.compute_loss(module(batch), module.head, batch)
        loss.backward()
    counted = counter.products[torch.ops.aten.mm] + counter.products[torch.ops.aten.addmm]
    flops = step_flops(module.loaded_model)
    formula = flops.per_token * length + flops.per_supervised_token * int(count)
    blocks, rank = module.model.model.layers, 4
    # nothing before the first layer is trained
    qkv, updates = blocks[0].self_attn.qkv_proj, 3 if backend == "loralib" else 1
    formula -= 2 * length * qkv.in_features * (qkv.out_features + updates * rank)
    if checkpointing == "full":  # the last product need not be recomputed
        formula -= sum(2 * length * rank * block.mlp.down_proj.out_features for block in blocks)
    assert counted == formula
