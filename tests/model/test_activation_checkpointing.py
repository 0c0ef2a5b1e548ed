"""Recomputation in the backward pass changes neither loss nor gradient, and covers the configured layers."""

from functools import partial

import pytest
import torch
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.errors import ConfigError
from phi3_lightning.model import activation_checkpointing, base
from phi3_lightning.model.compile import choose_compilation

LAYERS = 4
MODES = ["none", 2, 3, "selective", "full", "offload"]


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> str:
    changes = {"num_hidden_layers": LAYERS, "max_position_embeddings": 512, "original_max_position_embeddings": 512}
    return synthetic.save_tiny(tmp_path_factory.mktemp("deep") / "base", sliding_window=None, **changes)


@pytest.fixture
def unpinned(monkeypatch) -> None:
    """Do without pinned memory, which needs a GPU."""
    monkeypatch.setattr(activation_checkpointing, "save_on_cpu", lambda pin_memory: save_on_cpu())


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: dict = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] = self.counts.get(func, 0) + 1
        return func(*args, **kwargs or {})


def module_of(folder: str, mode, **options) -> Phi3LoRAModule:
    options = {"dtype": "float32", "lora": {"lora_dropout": 0.2}, "gradient_checkpointing": mode} | options
    return synthetic.randomised(Phi3LoRAModule(folder, **options))


def gradient(module: Phi3LoRAModule) -> torch.Tensor:
    torch.manual_seed(3)
    lengths = ([300, 20], [9])  # attention by a kernel, and by plain products
    documents = iter(synthetic.document(length, length - 1, length) for row in lengths for length in row)
    batch = synthetic.batch_of([[next(documents) for _ in row] for row in lengths])
    with module.autocast():
        loss, count = module.compute_loss(module(batch), module.head, batch)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss / count, list(module.trained_parameters()))])


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "bfloat16"}, {"lora": {"backend": "loralib", "lora_dropout": 0.2}},
     {"lora": {"use_dora": True, "lora_dropout": 0.2}}, {"attn_implementation": "sdpa"}],
    ids=["peft", "bfloat16", "loralib", "dora", "sdpa"],
)  # fmt: skip
def test_no_mode_changes_the_gradient(deep, unpinned, mode, options):
    expected = gradient(module_of(deep, "none", **options))
    assert torch.equal(gradient(module_of(deep, mode, **options)), expected)  # the same operations on the same numbers


def test_negative_control_other_dropout_in_recomputation_is_noticed(deep, monkeypatch):
    """The negative control."""
    expected = gradient(module_of(deep, "none"))
    careless = partial(torch.utils.checkpoint.checkpoint, preserve_rng_state=False)
    monkeypatch.setattr(activation_checkpointing, "checkpoint", careless)
    assert not torch.equal(gradient(module_of(deep, "full")), expected)


@pytest.mark.parametrize(
    ("mode", "again"), [("none", []), (2, [0, 2]), (3, [0, 3]), ("selective", [0, 1, 2, 3]), ("full", [0, 1, 2, 3])]
)
def test_the_configured_layers_are_recomputed(deep, mode, again):
    module = module_of(deep, mode)
    calls: list[int] = []
    for index, layer in enumerate(module.model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, index=index: calls.append(index))
    gradient(module)
    assert sorted(calls) == sorted([*range(LAYERS), *again])


@pytest.mark.parametrize("modes", [["full", "none"], ["none", "full"], ["full", 2], [2, "selective"]])
def test_the_last_call_sets_the_mode(deep, modes):
    model = base.load(deep)
    for mode in modes:
        activation_checkpointing.checkpoint_activations(model, mode)
    assert activation_checkpointing.mode_of(model) == modes[-1]


@pytest.mark.parametrize("mode", [*MODES, 4, 7])
def test_mode_and_recomputed_share_are_reported(deep, mode):
    model = base.load(deep)
    activation_checkpointing.checkpoint_activations(model, mode)
    assert activation_checkpointing.mode_of(model) == (min(mode, LAYERS) if isinstance(mode, int) else mode)
    again = {"none": 0, 2: 2 / 4, 3: 2 / 4, 4: 1 / 4, 7: 1 / 4, "selective": 0}.get(mode, 1)
    assert activation_checkpointing.recomputed_share(mode, LAYERS) == again


def test_every_n_layers_chooses_the_layers_of_transformers(deep):
    model = base.load(deep)
    if not hasattr(model, "activation_checkpointing_enable"):
        pytest.skip("this release of transformers has no such option")
    for every in (1, 2, 3):
        model.activation_checkpointing_enable(every_n_layers=every)
        theirs = [layer.gradient_checkpointing for layer in model.model.layers]
        activation_checkpointing.checkpoint_activations(model, every)
        assert [layer.gradient_checkpointing for layer in model.model.layers] == theirs


def test_selective_mode_does_not_recompute_products_and_kernels(deep):
    counts = {}
    for mode in ("none", "selective", "full"):
        with Operations() as operations:
            gradient(module_of(deep, mode))
        counts[mode] = operations.counts
    for operator in (torch.ops.aten.mm.default, torch.ops.phi3_lightning.attend_documents.default):
        assert counts["selective"][operator] == counts["none"][operator] > 0
        assert counts["full"][operator] > counts["none"][operator]
    silu = torch.ops.aten.silu.default
    assert counts["selective"][silu] == counts["full"][silu] == 2 * counts["none"][silu]


def test_only_the_input_of_each_layer_is_offloaded(deep, monkeypatch):
    packed: list[torch.Size] = []

    def recorded(pin_memory: bool):
        assert pin_memory
        hooks = save_on_cpu()
        pack = hooks.pack_hook
        hooks.pack_hook = lambda tensor: packed.append(tensor.shape) or pack(tensor)
        return hooks

    monkeypatch.setattr(activation_checkpointing, "save_on_cpu", recorded)
    gradient(module_of(deep, "offload"))
    hidden = torch.Size([1, 329, 32])
    assert packed.count(hidden) == LAYERS
    assert sum(shape.numel() for shape in packed) < 1.1 * LAYERS * hidden.numel()


def test_offload_on_a_cpu_is_refused(tiny_base, tmp_path):
    trainer = synthetic.trainer(tmp_path, max_steps=1)
    batch = synthetic.batch_of([[synthetic.document(9, 5, 0)]])
    with pytest.raises(ConfigError, match=r"model\.gradient_checkpointing: 'offload' .* use full"):
        trainer.fit(Phi3LoRAModule(tiny_base, gradient_checkpointing="offload"), synthetic.loader([batch]))


@pytest.mark.parametrize("mode", [0, 1, -2, True, 2.0, "half", None])
def test_an_unknown_mode_is_refused(tiny_base, mode):
    with pytest.raises(ConfigError, match=r"model\.gradient_checkpointing"):
        Phi3LoRAModule(tiny_base, gradient_checkpointing=mode)


def test_selective_mode_and_compiled_layers_exclude_each_other(deep, as_on_a_gpu):
    module = module_of(deep, "selective")
    assert "recomputation looks at operators" in choose_compilation(module.model, "auto", float("inf"))
    with pytest.raises(ConfigError, match=r"model\.torch_compile: layers hides .* selective"):
        choose_compilation(module.model, "layers", 1)
    activation_checkpointing.checkpoint_activations(module.model, 2)
    assert choose_compilation(module.model, "auto", float("inf")).startswith("compiled")
