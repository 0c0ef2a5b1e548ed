"""Properties of an adapter that hold for both backends."""

import copy
import importlib.util
from collections import Counter

import pytest
import torch

import synthetic
from adapters.conftest import frozen_base, logits, randomise, trained
from phi3_lightning.adapters import attach
from phi3_lightning.config import LoRA
from phi3_lightning.errors import ModelError

pytestmark = pytest.mark.parametrize("backend", ["peft", "loralib"])

EVERYWHERE = ["embed_tokens", "qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def small(backend: str, **options) -> LoRA:
    return LoRA(**{"backend": backend, "r": 4, "lora_alpha": 8, "lora_dropout": 0.3} | options)


@pytest.fixture(params=[{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}], ids=["gqa", "tied", "equal"])
def base(request, tmp_path) -> str:
    return synthetic.save_tiny(tmp_path / "base", **request.param)


@pytest.mark.parametrize("targets", [EVERYWHERE, "all-linear"])
def test_a_fresh_adapter_changes_no_logit(base, backend, targets):
    model = frozen_base(base)
    expected = logits(model)
    attach(model, small(backend, target_modules=targets))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_switched_off_adapter_gives_exactly_the_logits_of_the_base(base, backend, training):
    model = frozen_base(base)
    expected = logits(model)
    adapter = attach(model, small(backend, target_modules=EVERYWHERE))
    randomise(adapter.parameters())
    model.train(training)
    assert not torch.equal(logits(model), expected)
    with adapter.disabled():
        assert torch.equal(logits(model), expected)
        model.train(not training)  # loralib's own layers would merge here
        assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(model), expected)


def test_an_error_does_not_leave_the_adapter_off(tiny_base, backend):
    model = frozen_base(tiny_base)
    adapter = attach(model, small(backend, lora_dropout=0.0))
    randomise(adapter.parameters())
    expected = logits(model)
    with pytest.raises(RuntimeError, match="on the way"), adapter.disabled():
        raise RuntimeError("on the way")
    assert torch.equal(logits(model), expected)


def test_what_is_trained_is_the_same_before_and_after_switching(tiny_base, backend):
    model = frozen_base(tiny_base)
    adapter = attach(model, small(backend))
    before = list(trained(model))
    with adapter.disabled():
        pass
    assert list(trained(model)) == before
    assert [id(p) for p in adapter.parameters()] == [id(p) for p in trained(model).values()]
    assert len(before) == 2 * 4 * 2


def test_a_detached_base_is_bit_identical(base, backend):
    model, expected = frozen_base(base), frozen_base(base)
    adapter = attach(model, small(backend, target_modules=EVERYWHERE))
    randomise(adapter.parameters())
    assert adapter.detach() is model
    assert list(model.state_dict()) == list(expected.state_dict())
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))
    for ours, plain in zip(model.modules(), expected.modules(), strict=True):
        assert type(ours) is type(plain)
        assert vars(ours).keys() == vars(plain).keys()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), logits(expected))


def test_a_detached_base_takes_another_adapter(tiny_base, backend):
    model = frozen_base(tiny_base)
    attach(model, small(backend)).detach()
    attach(model, small(backend, r=2, target_modules=["o_proj"]))
    assert {parameter.shape[0] for name, parameter in trained(model).items() if "lora_A" in name} == {2}


def test_every_parameter_has_a_name_in_the_base_or_a_role_in_the_adapter(base, backend):
    model = frozen_base(base)
    names = {name for name, _ in model.named_parameters()}
    adapter = attach(model, small(backend, target_modules=EVERYWHERE))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {adapter.base_name(name) for name in frozen} == names
    assert {adapter.role(name) for name in frozen} == {None}
    assert Counter(map(adapter.role, trained(model))) == {"embedding": 2, "lora_A": 8, "lora_B": 8}


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_float32_over_any_base_and_default(tiny_base, backend, dtype, default):
    model = frozen_base(tiny_base, dtype)
    torch.set_default_dtype(default)
    try:
        attach(model, small(backend, target_modules=EVERYWHERE))
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}


def test_the_default_dtype_does_not_change_initial_values(tiny_base, backend):
    starts = []
    for default in (torch.float32, torch.bfloat16):
        model = frozen_base(tiny_base)
        torch.set_default_dtype(default)
        torch.manual_seed(5)
        try:
            attach(model, small(backend))
        finally:
            torch.set_default_dtype(torch.float32)
        starts.append(list(trained(model).values()))
    assert all(map(torch.equal, *starts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_weights_are_the_same_tensors_and_never_written(base, backend, dtype):
    model = frozen_base(base, dtype)
    places = {id(parameter) for parameter in model.parameters()}
    before = copy.deepcopy(model.state_dict())
    adapter = attach(model, small(backend, target_modules=EVERYWHERE))
    randomise(adapter.parameters())
    for mode in (True, False, True, False):
        logits(model.train(mode))
    assert {id(parameter) for parameter in model.parameters() if not parameter.requires_grad} == places
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_work_with_and_without_autocast(tiny_base, backend, dtype, autocast):
    """The LoRA delta is applied in the dtype of the base, and its gradient reaches every weight."""
    model = frozen_base(tiny_base, dtype)
    plain = logits(model)
    adapter = attach(model, small(backend, lora_dropout=0.0, target_modules=EVERYWHERE))
    randomise(adapter.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        answers = logits(model)
    assert answers.dtype == (torch.bfloat16 if autocast else dtype)
    moved = (answers.float() - plain.float()).abs().max()
    gradients = torch.autograd.grad(answers.float().square().mean(), list(adapter.parameters()))
    assert moved > 0.05 * plain.abs().max()
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_a_missing_loralib_is_named_with_its_extra(tiny_base, backend, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("phi3_lightning.adapters.find_spec", lambda name: None if name == "loralib" else find(name))
    model = frozen_base(tiny_base)
    if backend == "peft":
        attach(model, small(backend))
    else:
        with pytest.raises(ModelError, match=r"pip install 'phi3-lightning\[loralib\]'"):
            attach(model, small(backend))
