"""Compiled decoder layers give the gradient of plain ones, and are used where that pays off."""

import pytest
import torch
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.errors import ConfigError
from phi3_lightning.model import packed_attention
from phi3_lightning.model.compile import MIN_COMPILED_MICRO_BATCHES, choose_compilation

# torch accesses .grad of every tensor it traces
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

EPSILON = torch.finfo(torch.float32).eps
LENGTHS = [[5, 30], [9]], [[3, 3], [20]], [[17], [17, 1]]


def batch(lengths):
    seeds = iter(range(9))
    return synthetic.batch_of(
        [[synthetic.document(length, length - 1, next(seeds)) for length in row] for row in lengths]
    )


def module_of(base: str, **options) -> Phi3LoRAModule:
    lora = {"lora_dropout": 0.0, **options.pop("lora", {})}
    return synthetic.randomised(Phi3LoRAModule(base, dtype="float32", lora=lora, **options))


def gradient(module, lengths) -> torch.Tensor:
    found = batch(lengths)
    loss, count = module.compute_loss(module(found), module.head, found)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss / count, list(module.trained_parameters()))])


@pytest.mark.parametrize("window", [None, 8])
def test_one_kernel_call_for_all_documents_equals_one_call_each(tmp_path, monkeypatch, window):
    module = module_of(synthetic.save_tiny(tmp_path / "base", sliding_window=window))
    expected = [gradient(module, lengths) for lengths in LENGTHS]
    monkeypatch.setattr(packed_attention, "takes_varlen", lambda model, device: True)
    monkeypatch.setattr(packed_attention, "varlen_attn", synthetic.attention_by_mask)
    for lengths, single in zip(LENGTHS, expected, strict=True):
        # float32 products of at most 64 terms in another order, through two layers and back
        assert (gradient(module, lengths) - single).abs().max() <= 4 * 64 * EPSILON * single.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "checkpointing"), [("peft", "full"), ("loralib", "none")])
def test_all_layers_share_their_graph_and_give_the_plain_gradient(tmp_path, as_on_a_gpu, backend, checkpointing):
    base = synthetic.save_tiny(tmp_path / "base", num_hidden_layers=4)
    module = module_of(base, gradient_checkpointing=checkpointing, lora={"backend": backend})
    expected = [gradient(module, lengths) for lengths in LENGTHS]
    choose_compilation(module.model, "layers", 1)
    torch._dynamo.utils.counters.clear()
    for lengths, single in zip(LENGTHS, expected, strict=True):
        # through four layers and back
        assert (gradient(module, lengths) - single).abs().max() <= 8 * 64 * EPSILON * single.abs().max()
    # one for the first layer, whose input has no gradient, and one for all the others, whatever the lengths
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_evaluation_is_not_compiled(tiny_base, as_on_a_gpu):
    module = module_of(tiny_base)
    choose_compilation(module.model, "layers", 1)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        module(batch(LENGTHS[0]))
    module.eval()(batch(LENGTHS[0]))
    assert not torch._dynamo.utils.counters["stats"]


def test_auto_compiles_runs_long_enough_to_pay_off(tiny_base, as_on_a_gpu):
    module = module_of(tiny_base)

    def is_compiled() -> bool:
        return all(type(layer).__name__.startswith("Compiled") for layer in module.model.model.layers)

    enough = MIN_COMPILED_MICRO_BATCHES
    for option, micro_batches, expected in (
        ("auto", enough - 1, False), ("auto", enough, True), ("auto", float("inf"), True),
        ("none", float("inf"), False), ("layers", 1, True),
    ):  # fmt: skip
        choose_compilation(module.model, option, micro_batches)
        assert is_compiled() == expected
    weight = module.model.model.layers[1].mlp.down_proj.base_layer
    weight.weight = torch.nn.Parameter(weight.weight.data.to(torch.uint8), requires_grad=False)  # as in 4 bits
    choose_compilation(module.model, "auto", float("inf"))
    assert not is_compiled()
    choose_compilation(module.model, "layers", 1)
    base = module.detach_adapter()
    assert all(type(layer) is Phi3DecoderLayer for layer in base.model.layers)


def test_a_cpu_does_not_compile_and_refuses_to(tiny_base, tmp_path):
    module = Phi3LoRAModule(tiny_base)
    module.configure_model()
    choose_compilation(module.model, "auto", float("inf"))
    assert all(type(layer) is Phi3DecoderLayer for layer in module.model.model.layers)
    with pytest.raises(ConfigError, match=r"model\.torch_compile: layers needs .* on cpu; leave it out"):
        synthetic.trainer(tmp_path, max_steps=1).fit(
            Phi3LoRAModule(tiny_base, torch_compile="layers"), synthetic.loader([batch(LENGTHS[0])])
        )
