"""How much of the base an FSDP2 rank holds, counted as bytes of tensors alive at one time."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import synthetic

from . import cases, ranks


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors that operations have made, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.note(tensor)
        self.peak = max(self.peak, self.now())
        return result

    def note(self, tensor: torch.Tensor) -> None:
        tensor = tensor.to_local() if isinstance(tensor, cases.DTensor) else tensor
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = weakref.ref(storage)

    def now(self) -> int:
        total = 0
        for key, reference in list(self.storages.items()):
            storage = reference()
            if storage is None:
                del self.storages[key]
            else:
                total += storage.nbytes()  # FSDP2 frees a gathered weight by emptying its storage
        return total


LARGE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> str:
    """A base of 29 MB, next to which an adapter of rank 1 and one row of 6 tokens are small."""
    return synthetic.save_tiny(tmp_path_factory.mktemp("large") / "base", vocab_size=1000, **LARGE)


def measure(base: str, folder, strategy: dict, world: int) -> dict[str, int]:
    module = cases.module(base, lora={"lora_dropout": 0.0, "r": 1})
    live = LiveBytes()
    sizes: dict[str, int] = {}

    class AfterLoading(cases.pl.Callback):
        def on_train_start(self, trainer, pl_module):
            frozen = [p for p in pl_module.parameters() if not p.requires_grad]
            sizes["base"] = sum(p.nbytes for p in frozen)  # the size of the whole weight, where it is sharded
            sizes["share"] = sum((p.to_local() if isinstance(p, cases.DTensor) else p).nbytes for p in frozen)
            sizes["loading"], live.peak = live.peak, 0
            sizes["layer"] = sum(p.nbytes for p in pl_module.model.model.layers[0].parameters())
            sizes["head"] = pl_module.model.lm_head.weight.nbytes
            sizes["trained"] = sum(p.nbytes for p in pl_module.trained_parameters())

    trainer = cases.trainer(folder, cases.fsdp2(**strategy), world, callbacks=[AfterLoading()], max_steps=3)
    batch = synthetic.batch_of([[synthetic.document(6, 3, 0)]])
    with live:
        trainer.fit(module, synthetic.loader([batch] * 3))
    print(sizes | {"training": live.peak})
    return sizes | {"training": live.peak}


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_no_rank_holds_the_base(large, tmp_path, world):
    for found in ranks.run(tmp_path, world, measure, large, tmp_path, {}, world):
        share = found["base"] / world
        assert found["share"] == pytest.approx(share, rel=0.01)
        # while loading: this rank's shard, and at most one whole weight that is being loaded
        assert found["loading"] <= share + found["layer"] + 0.05 * found["base"]
        # while training the head is kept from the loss on; in the backward pass one layer is used while the next is
        # gathered into a buffer and copied out of it. Adapters have a gradient and two moments
        units = found["head"] + 3 * found["layer"]
        assert found["training"] <= share + units + 4 * found["trained"] + 0.05 * found["base"]
        assert found["training"] < 0.9 * found["base"]


@pytest.mark.slow
def test_negative_control_without_resharding_a_rank_holds_the_base(large, tmp_path):
    """The control: with reshard_after_forward off all layers are there at once, and the measure shows it."""
    for found in ranks.run(tmp_path, 2, measure, large, tmp_path, {"reshard_after_forward": False}, 2):
        assert found["training"] > found["base"]
