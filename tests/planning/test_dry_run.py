"""A step on fake tensors needs the memory of a real one, counted in live storages."""

import weakref
from dataclasses import astuple, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.batch import Batch
from phi3_lightning.planning import dry_run
from phi3_lightning.planning.dry_run import FakeModule
from phi3_lightning.planning.step import BatchShape

WIDE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6, "vocab_size": 500}
ROWS = [[synthetic.document(70, 40, 0), synthetic.document(30, 20, 1)], [synthetic.document(60, 50, 2)]]
SHAPE = BatchShape([[70, 30], [60]], 40 + 20 + 50)


class PeakLiveBytes(TorchDispatchMode):
    """Records the peak bytes of live storages that operations have made."""

    def __init__(self, before: list[torch.Tensor]) -> None:
        super().__init__()
        self.before = {tensor.untyped_storage()._cdata for tensor in before}
        self.storages: dict[int, weakref.ref] = {}
        self.peak = 0

    def now(self) -> int:
        self.storages = {key: reference for key, reference in self.storages.items() if reference() is not None}
        return sum(reference().nbytes() for reference in self.storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and (storage := leaf.untyped_storage())._cdata not in self.before:
                self.storages[storage._cdata] = weakref.ref(storage)
        self.peak = max(self.peak, self.now())
        return result


def real_step(module: Phi3LoRAModule, batch: Batch | None = None) -> tuple[int, int]:
    """Bytes kept for the backward pass, and peak bytes, of a real step on real tensors."""
    module.configure_model()
    module.model.train()
    batch = batch or synthetic.batch_of(ROWS)
    for parameter in module.trained_parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [parameter.grad for parameter in module.trained_parameters()]
    before += [*module.parameters(), *module.buffers(), *module.reference.state_dict().values()]
    with PeakLiveBytes(before) as alive:
        with module.autocast():
            loss, _ = module.compute_loss(module(batch), module.head, batch)
        kept = alive.now()
        loss.backward()
    return kept, alive.peak


def fake(base: str, mixed: bool = True, **options) -> FakeModule:
    return FakeModule(replace(Phi3LoRAModule(base, **options).spec(), mixed=mixed))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return synthetic.save_tiny(tmp_path_factory.mktemp("wide") / "base", torch.bfloat16, **WIDE)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory) -> str:
    changes = WIDE | {"num_hidden_layers": 2}
    return synthetic.save_tiny(tmp_path_factory.mktemp("shallow") / "base", torch.bfloat16, **changes)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "options",
    [{}, {"lora": {"backend": "loralib", "r": 4}}, {"lora": {"use_dora": True}}, {"dtype": "float32"},
     {"lora": {"modules_to_save": ["embed_tokens"]}}],
    ids=["peft", "loralib", "dora", "float32", "whole"],
)  # fmt: skip
def test_a_dry_run_has_the_memory_of_a_real_step(shallow, options, checkpointing):
    found = fake(shallow, mixed=False, **options).activations(SHAPE, checkpointing)
    kept, peak = real_step(Phi3LoRAModule(shallow, gradient_checkpointing=checkpointing, **options))
    # only the mask of supervised positions and their indices differ, by some bytes per position
    places = 200 * 32
    assert found.stored == pytest.approx(kept, abs=places)
    assert found.stored + max(found.head, found.layer) == pytest.approx(peak, abs=places)


PAIRS = [[synthetic.pair(50, 30, 20, 0)], [synthetic.pair(20, 40, 30, 1), synthetic.pair(10, 10, 5, 2)]]


@pytest.mark.parametrize(
    ("name", "checkpointing", "lora"),
    [("dpo", "full", {"init_lora_weights": False}), ("simpo", "none", {}), ("kto", "selective", {})],
)
def test_a_dry_run_of_preferences_has_the_memory_of_a_real_step(base, name, checkpointing, lora):
    batch = synthetic.pairs_of(PAIRS)
    if name == "kto":
        documents = [[document for pair in row for document in pair] for row in PAIRS]
        batch = synthetic.labelled_of(documents, [[True, False] * len(row) for row in PAIRS])
    options = {"objective": {"name": name}, "lora": lora, "gradient_checkpointing": checkpointing}
    found = fake(base, mixed=False, **options).activations(BatchShape.of(batch), checkpointing)
    kept, peak = real_step(Phi3LoRAModule(base, **options), batch)
    places = 2 * batch["input_ids"].numel() * 32  # of the masks and indices of two answers
    assert found.stored == pytest.approx(kept, abs=places)
    assert found.peak == pytest.approx(peak, abs=places)
    assert (found.reference > 0) == (name != "simpo")


def test_the_pass_of_a_reference_has_no_backward_pass_and_computes_shared_tokens_once(base):
    shape = BatchShape.of(synthetic.pairs_of([[synthetic.pair(200, 10, 10, 0)]]))
    dpo, simpo = (fake(base, objective={"name": name}).activations(shape, "none") for name in ("dpo", "simpo"))
    assert dpo.stored == simpo.stored
    assert 0 < dpo.reference < dpo.stored
    twice = fake(base, objective={"name": "dpo"}).activations(replace(shape, shared=[[0, 0]]), "none")
    assert dpo.stored < 0.7 * twice.stored
    assert shape.computed_tokens(Phi3LoRAModule(base).spec()) == 2 * 210 - 199
    assert shape.computed_tokens(Phi3LoRAModule(base, attn_implementation="sdpa").spec()) == 2 * 210


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_memory_of_deep_models_is_extrapolated_from_shallow_ones(base, checkpointing, monkeypatch):
    module = fake(base)
    extrapolated = module.activations(SHAPE, checkpointing)
    assert len(module.model.model.layers) == module.model.config.num_hidden_layers == WIDE["num_hidden_layers"]
    monkeypatch.setattr(dry_run, "EXTRAPOLATED_DEPTHS", (8, 9))  # more layers than there are: all of them run
    whole = fake(base).activations(SHAPE, checkpointing)
    assert astuple(extrapolated) == pytest.approx(astuple(whole), rel=1e-6, abs=64)


def test_models_with_unequal_layers_are_not_extrapolated(base):
    some, every = fake(base, lora={"layers_to_transform": [5]}), fake(base)
    assert every.alike
    assert not some.alike
    # no gradient passes the five layers below, which keep nothing
    kept = [module.activations(SHAPE, "none").stored for module in (some, every)]
    assert kept[0] < 0.3 * kept[1]


def test_a_dry_run_allocates_no_values(base):
    """Shapes alone decide, and nothing of the model's size is allocated."""
    module = fake(base)
    assert {type(parameter.data).__name__ for parameter in module.model.parameters()} == {"FakeTensor"}
    doubled = module.activations(BatchShape([[140, 60], [120]], 220), "full")
    single = module.activations(SHAPE, "full")
    assert 1.8 < doubled.stored / single.stored < 2.3  # attention within short documents grows faster


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_with_a_mask_is_planned_too(base, attention):
    assert fake(base, attn_implementation=attention).activations(SHAPE, "none").stored > 0


@pytest.mark.parametrize("every", [2, 3])
def test_memory_of_every_n_layers_is_that_of_a_real_step(base, every):
    module = fake(base, mixed=False)
    found = module.activations(SHAPE, every)
    kept, peak = real_step(Phi3LoRAModule(base, gradient_checkpointing=every))
    layer = module.activations(SHAPE, "none").stored / WIDE["num_hidden_layers"]
    assert found.stored == pytest.approx(kept, abs=200 * 32 + 0.1 * layer)  # the first layer keeps less than others
    # at the peak the last layer is recomputed while some of what the others kept is freed already
    assert peak - 200 * 32 - 0.1 * layer <= found.stored + max(found.head, found.layer) <= peak + every * layer


def test_hidden_states_that_are_offloaded_are_not_on_the_device(base):
    module = fake(base)
    full, offload = (module.activations(SHAPE, mode) for mode in ("full", "offload"))
    assert full.stored - offload.stored == WIDE["num_hidden_layers"] * SHAPE.tokens * WIDE["hidden_size"] * 2
    assert (offload.head, offload.layer) == (full.head, full.layer)
    assert 0 < offload.stored < 0.5 * full.stored


@pytest.mark.parametrize("name", ["supervised", "dpo"])
def test_a_dry_run_of_a_validation_has_the_memory_of_a_real_one(base, name):
    batch = synthetic.batch_of(ROWS) if name == "supervised" else synthetic.pairs_of(PAIRS)
    found = fake(base, mixed=False, objective={"name": name}).validation_activations(BatchShape.of(batch))
    module = Phi3LoRAModule(base, objective={"name": name})
    module.configure_model()
    module.model.eval()
    before = [*module.parameters(), *module.buffers()]
    with PeakLiveBytes(before) as alive, torch.no_grad(), module.autocast():
        module.compute_loss(module(batch), module.head, batch)
    places = 2 * batch["input_ids"].numel() * 32
    assert found.peak == pytest.approx(alive.peak, abs=places)
    trained = fake(base, mixed=False, objective={"name": name}).activations(BatchShape.of(batch), "full")
    assert found.peak < trained.peak - places
