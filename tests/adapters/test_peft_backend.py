"""The adapter against PEFT used in the plain way."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import Phi3ForCausalLM

from phi3_lightning.adapters.peft_backend import PeftAdapter
from phi3_lightning.config import LoRA

# get_peft_model asks transformers for gradient checkpointing by its old name
ASKS_BY_AN_OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
OPTIONS = {
    "plain": LoRA(r=4, lora_alpha=8, lora_dropout=0.0),
    "dropout": LoRA(r=4, lora_alpha=8, lora_dropout=0.3),
    "rslora": LoRA(r=4, lora_alpha=8, lora_dropout=0.0, use_rslora=True),
    "a fraction as alpha": LoRA(r=4, lora_alpha=2.5, lora_dropout=0.0),
    "some layers": LoRA(r=2, lora_alpha=8, lora_dropout=0.0, target_modules=["qkv_proj", "down_proj"]),
}


def frozen_base(folder: str, dtype: torch.dtype = torch.float32) -> Phi3ForCausalLM:
    return Phi3ForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)


def randomise(parameters) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def trained(model) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits_and_gradients(model) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(2)  # dropout
    logits = model.train()(input_ids=IDS, use_cache=False).logits
    return logits, torch.autograd.grad(logits.square().mean(), list(trained(model).values()))


def attached(folder: str, config: LoRA) -> tuple[Phi3ForCausalLM, PeftAdapter]:
    model = frozen_base(folder)
    return model, PeftAdapter(model, config)


@pytest.mark.parametrize("name", OPTIONS)
@ASKS_BY_AN_OLD_NAME
def test_forward_and_gradients_are_those_of_plain_peft(tiny_base, name):
    config = OPTIONS[name]
    ours, _ = attached(tiny_base, config)
    theirs = get_peft_model(
        frozen_base(tiny_base),
        LoraConfig(
            r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
            target_modules=config.target_modules, use_rslora=config.use_rslora, task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    assert [f"base_model.model.{key}" for key in trained(ours)] == list(trained(theirs))
    for model in (ours, theirs):
        randomise(trained(model).values())
    (logits, gradients), (expected, expected_gradients) = map(logits_and_gradients, (ours, theirs))
    assert torch.equal(logits, expected)
    assert all(map(torch.equal, gradients, expected_gradients))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@ASKS_BY_AN_OLD_NAME
def test_the_start_is_that_of_plain_peft_with_the_same_seed(tiny_base, dtype):
    config = OPTIONS["plain"]
    ours, theirs = frozen_base(tiny_base, dtype), frozen_base(tiny_base, dtype)
    torch.manual_seed(5)
    PeftAdapter(ours, config)
    torch.manual_seed(5)
    peft_config = LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=config.target_modules)
    theirs = get_peft_model(theirs, peft_config)
    assert all(map(torch.equal, trained(ours).values(), trained(theirs).values()))


def test_a_fresh_adapter_changes_no_logit(tiny_base):
    model = frozen_base(tiny_base)
    expected = model(IDS, use_cache=False).logits
    PeftAdapter(model, OPTIONS["plain"])
    assert torch.equal(model(IDS, use_cache=False).logits, expected)


@pytest.mark.parametrize("training", [True, False])
def test_switched_off_the_model_answers_exactly_as_its_base(tiny_base, training):
    model, adapter = attached(tiny_base, OPTIONS["dropout"])
    expected = frozen_base(tiny_base)(IDS, use_cache=False).logits
    randomise(adapter.parameters())
    model.train(training)
    assert not torch.equal(model(IDS, use_cache=False).logits, expected)
    with adapter.disabled():
        assert torch.equal(model(IDS, use_cache=False).logits, expected)
    assert not torch.equal(model(IDS, use_cache=False).logits, expected)


def test_an_error_does_not_leave_the_adapter_off(tiny_base):
    model, adapter = attached(tiny_base, OPTIONS["plain"])
    randomise(adapter.parameters())
    expected = model(IDS, use_cache=False).logits
    with pytest.raises(RuntimeError, match="on the way"), adapter.disabled():
        raise RuntimeError("on the way")
    assert torch.equal(model(IDS, use_cache=False).logits, expected)


def test_what_is_trained_is_the_same_before_and_after_switching(tiny_base):
    model, adapter = attached(tiny_base, OPTIONS["plain"])
    before = list(trained(model))
    with adapter.disabled():
        pass
    assert list(trained(model)) == before
    assert len(list(adapter.parameters())) == len(before) == 2 * 4 * 2


def test_detached_the_base_is_bit_identical(tiny_base):
    model, adapter = attached(tiny_base, OPTIONS["plain"])
    randomise(adapter.parameters())
    base = adapter.detach()
    expected = frozen_base(tiny_base)
    assert base is model
    assert list(base.state_dict()) == list(expected.state_dict())
    assert all(map(torch.equal, base.state_dict().values(), expected.state_dict().values()))
    assert [type(module) for module in base.modules()] == [type(module) for module in expected.modules()]
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_a_detached_base_takes_another_adapter(tiny_base):
    model, first = attached(tiny_base, OPTIONS["plain"])
    first.detach()
    PeftAdapter(model, LoRA(r=2))
    assert {parameter.shape[0] for name, parameter in trained(model).items() if "lora_A" in name} == {2}


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_float32_over_any_base_and_default(tiny_base, dtype, default):
    model = frozen_base(tiny_base, dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        PeftAdapter(model, OPTIONS["plain"])
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(before)
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}


def test_torch_default_dtype_does_not_change_the_start(tiny_base):
    starts = []
    for default in (torch.float32, torch.bfloat16):
        model = frozen_base(tiny_base)
        torch.set_default_dtype(default)
        torch.manual_seed(5)
        try:
            PeftAdapter(model, OPTIONS["plain"])
        finally:
            torch.set_default_dtype(torch.float32)
        starts.append(list(trained(model).values()))
    assert all(map(torch.equal, *starts))


def test_under_autocast_the_input_is_not_cast_back_and_forth(tiny_base):
    model = frozen_base(tiny_base, torch.bfloat16)
    adapter = PeftAdapter(model, OPTIONS["plain"])
    randomise(adapter.parameters())
    seen = []
    layer = model.model.layers[0].self_attn.qkv_proj
    layer.lora_A["default"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(IDS, use_cache=False)
    model(IDS, use_cache=False)
    assert seen == [torch.bfloat16, torch.float32]


def test_base_weights_are_never_written(tiny_base):
    model = frozen_base(tiny_base)
    before = copy.deepcopy(model.state_dict())
    adapter = PeftAdapter(model, OPTIONS["plain"])
    randomise(adapter.parameters())
    for mode in (True, False, True, False):
        model.train(mode)(IDS, use_cache=False)
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


@ASKS_BY_AN_OLD_NAME
def test_the_form_of_peft_opens_in_plain_peft(tiny_base, tmp_path):
    model, adapter = attached(tiny_base, OPTIONS["rslora"])
    randomise(adapter.parameters())
    form = adapter.to_peft()
    form.config.save_pretrained(tmp_path)
    save_file(form.tensors, tmp_path / "adapter_model.safetensors")
    plain = PeftModel.from_pretrained(frozen_base(tiny_base), tmp_path)
    torch.testing.assert_close(plain.eval()(IDS).logits, model.eval()(IDS).logits)
