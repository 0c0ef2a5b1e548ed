"""Norms and ranks of LoRA deltas, against the dense deltas, which the code never builds."""

import importlib.util

import pytest
import torch

import synthetic
from adapters.conftest import frozen_base, logits, randomise, trained
from phi3_lightning.adapters import attach
from phi3_lightning.adapters.convert import peft_keys
from phi3_lightning.adapters.statistics import Statistics
from phi3_lightning.adapters.targets import rank_and_scaling
from phi3_lightning.config import LoRA
from phi3_lightning.config.lora import PHI3_FUSED_LAYERS

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SECTIONS = {
    "peft": {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 6}},
    "loralib": {"backend": "loralib"},
    "loralib slices": {"backend": "loralib", "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "qkv_proj"]},
    "dora": {"use_dora": True},
}


def attached(base, **options):
    model = frozen_base(base)
    adapter = attach(model, LoRA(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0} | options))
    randomise([p for name, p in trained(model).items() if "magnitude" not in name])
    return model, adapter


def dense(adapter, weights):
    """Each adapted matrix and its delta in float64, from the tensors of PEFT's files."""
    form = adapter.to_peft()
    head = 32 // 4
    sizes = {"qkv_proj": (32, 2 * head, 2 * head), "gate_up_proj": (64, 64)}
    for target in adapter.targets:
        down, up = (form.tensors[key].double() for key in peft_keys(target))
        delta = rank_and_scaling(form.config, target.path)[1] * up @ down
        weight = weights[f"{target.path}.weight"].double()
        if target.embedding:
            yield target.path, target.name, weight, delta
            continue
        names = PHI3_FUSED_LAYERS.get(target.name, (target.name,))
        rows = sizes.get(target.name, (len(weight),))
        for name, matrix, change in zip(names, weight.split(rows), delta.split(rows), strict=True):
            if change.any():
                yield target.path, name, matrix, change


@pytest.mark.parametrize("options", SECTIONS.values(), ids=SECTIONS)
def test_norm_and_effective_rank_are_those_of_the_dense_delta(tiny_base, options):
    weights = frozen_base(tiny_base).state_dict()
    model, adapter = attached(tiny_base, **options)
    found = Statistics(model, adapter).deltas()
    expected = list(dense(adapter, weights))
    assert [(update.layer, update.slice) for update in found] == [(path, name) for path, name, *_ in expected]
    for update, (_, _, weight, change) in zip(found, expected, strict=True):
        singular = torch.linalg.svdvals(change)
        share = singular / singular.sum()
        # weights are measured in float32
        assert update.relative_norm == pytest.approx((change.norm() / weight.norm()).item(), rel=1e-5)
        # the dense product is computed in float64 from float32 values: roots of squares lose half of the digits
        assert update.effective_rank == pytest.approx(torch.special.entr(share).sum().exp().item(), rel=1e-5)


@pytest.mark.parametrize("options", [SECTIONS["peft"], SECTIONS["loralib"]], ids=["peft", "loralib"])
def test_a_zero_delta_has_norm_and_rank_zero(tiny_base, options):
    model = frozen_base(tiny_base)
    adapter = attach(model, LoRA(**{"r": 4} | options))
    assert {(u.relative_norm, u.effective_rank) for u in Statistics(model, adapter).deltas()} == {(0.0, 0.0)}


def test_effective_rank_counts_orthogonal_directions(tiny_base):
    model, adapter = attached(tiny_base, target_modules=["o_proj"])
    for target in adapter.targets:
        down, up = adapter.lora_AB(target)
        torch.nn.init.orthogonal_(down.data)
        torch.nn.init.orthogonal_(up.data)
    assert [u.effective_rank for u in Statistics(model, adapter).deltas()] == pytest.approx([4.0, 4.0])
    for target in adapter.targets:
        adapter.lora_AB(target)[1].data[:, 1:] = 0
    assert [u.effective_rank for u in Statistics(model, adapter).deltas()] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("options", [SECTIONS["peft"], SECTIONS["loralib"]], ids=["peft", "loralib"])
def test_gradient_norms_are_those_of_each_layer(tiny_base, options):
    model, adapter = attached(tiny_base, **options)
    assert set(Statistics(model, adapter).gradient_norms().values()) == {0.0}
    logits(model.train()).square().mean().backward()
    found = Statistics(model, adapter).gradient_norms()
    for target in adapter.targets:
        own = [p.grad.flatten() for name, p in trained(model).items() if name.startswith(f"{target.path}.lora_")]
        assert found[target.path] == pytest.approx(torch.cat(own).norm().item(), rel=1e-6)
    whole = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert torch.tensor(list(found.values())).norm().item() == pytest.approx(whole.item(), rel=1e-5)


def test_weights_are_measured_once_and_nothing_is_written(tiny_base):
    model, adapter = attached(tiny_base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    statistics = Statistics(model, adapter)
    first = statistics.deltas()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data.zero_()
    assert statistics.deltas() == first


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="the extra qlora is not installed")
@pytest.mark.parametrize("backend", ["peft", "loralib"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_is_measured_in_4_bits_and_left_out_in_8(tmp_path, quantization, backend):
    from phi3_lightning.model import base as base_model

    folder = synthetic.save_tiny(tmp_path / "base", hidden_size=64, intermediate_size=128)
    model = base_model.load(folder, dtype="float32", quantization=quantization, device=torch.device("cpu"))
    adapter = attach(model, LoRA(r=4, lora_dropout=0.0, backend=backend))
    randomise(trained(model).values())
    plain = frozen_base(folder)
    reference = attach(plain, LoRA(r=4, lora_dropout=0.0, backend=backend))
    randomise(trained(plain).values())
    found, expected = Statistics(model, adapter).deltas(), Statistics(plain, reference).deltas()
    for statistic, other in zip(found, expected, strict=True):
        assert statistic.effective_rank == pytest.approx(other.effective_rank, rel=1e-5)
        if quantization == "int8":
            assert statistic.relative_norm is None
        else:  # a step of NF4 is at most 0.3 of the largest value of a block; over a matrix the errors cancel
            assert statistic.relative_norm == pytest.approx(other.relative_norm, rel=0.05)
