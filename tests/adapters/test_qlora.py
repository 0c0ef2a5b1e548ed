"""Both backends over a 4-bit and an 8-bit base."""

import importlib.util
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, Phi3ForCausalLM

import synthetic
from adapters.conftest import logits, logits_and_gradients, randomise, trained
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.adapters import attach
from phi3_lightning.config import LoRA
from phi3_lightning.errors import ModelError

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="the extra qlora is not installed"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

BATCH = synthetic.batch_of([[synthetic.document(12, 6, seed)] for seed in range(2)])
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module", params=[{}, {"num_key_value_heads": 4}, {"tie_word_embeddings": True}])
def base(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("quantized") / "base"
    return synthetic.save_tiny(folder, **{"hidden_size": 64, "intermediate_size": 128} | request.param)


def quantized(base: str, kind: str, dtype: torch.dtype = torch.float32) -> Phi3ForCausalLM:
    how = BitsAndBytesConfig(**KINDS[kind], bnb_4bit_compute_dtype=dtype)
    model = Phi3ForCausalLM.from_pretrained(base, quantization_config=how, device_map={"": "cpu"}, dtype=dtype)
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_loralib_and_plain_peft_with_the_same_weights_are_equal(base, kind):
    """8 bits quantise each layer's input too: a difference in its last bit may become a whole quantisation step."""
    ours, theirs = quantized(base, kind), quantized(base, kind)
    adapter = attach(ours, LoRA(backend="loralib", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["o_proj"]))
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj"]))
    for model in (ours, theirs):
        randomise(trained(model).values())
    (answers, gradients), (expected, expected_gradients) = map(logits_and_gradients, (ours, theirs))
    tolerance = {} if kind == "nf4" else {"rtol": 2 / 127, "atol": 2 / 127 * expected.abs().max().item()}
    torch.testing.assert_close(answers, expected, **tolerance)
    if kind == "nf4":
        for gradient, expected_gradient in zip(gradients.values(), expected_gradients.values(), strict=True):
            torch.testing.assert_close(gradient, expected_gradient)
    adapter.detach()
    assert [type(m) for m in ours.modules()] == [type(m) for m in quantized(base, kind).modules()]


@pytest.mark.parametrize("targets", [["qkv_proj", "gate_up_proj"], ["q_proj", "v_proj", "up_proj", "down_proj"]])
def test_fused_slices_over_nf4_equal_their_export_in_peft(base, targets):
    ours, theirs = quantized(base, "nf4"), quantized(base, "nf4")
    adapter = attach(ours, LoRA(backend="loralib", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets))
    randomise(adapter.parameters())
    form = adapter.to_peft()
    again = attach(theirs, LoRA(r=form.config.r, lora_alpha=form.config.lora_alpha, lora_dropout=0.0,
                                target_modules=sorted(form.config.target_modules)))  # fmt: skip
    again.load_peft(form, "the form")
    (answers, gradients), (expected, expected_gradients) = map(logits_and_gradients, (ours, theirs))
    torch.testing.assert_close(answers, expected)
    for target in adapter.targets:
        rows = sum(target.enabled) * target.r
        torch.testing.assert_close(
            gradients[f"{target.path}.lora_A"], expected_gradients[f"{target.path}.lora_A.default.weight"][:rows]
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [{}, {"backend": "loralib"}, {"use_dora": True}, {"init_lora_weights": "orthogonal"}])
def test_a_fresh_or_switched_off_adapter_gives_the_logits_of_the_base(base, kind, lora):
    model = quantized(base, kind)
    expected = logits(model)
    if kind == "int8" and lora.get("use_dora"):
        with pytest.raises(ModelError, match=r"model\.lora\.use_dora: .*set model\.quantization: nf4"):
            attach(model, LoRA(**lora))
        return
    adapter = attach(model, LoRA(**lora))
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    if not lora.get("init_lora_weights"):
        torch.testing.assert_close(logits(model), expected)
    randomise(adapter.parameters())
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    with adapter.disabled():
        assert torch.equal(logits(model), expected)


def test_a_quantised_module_cannot_be_trained_whole(base):
    lora = LoRA(target_modules=["qkv_proj"], modules_to_save=["o_proj"])
    with pytest.raises(ModelError, match=r"model\.lora\.modules_to_save: .*o_proj is quantised, .*quantization null"):
        attach(quantized(base, "nf4"), lora)


@pytest.mark.parametrize("backend", ["peft", "loralib"])
def test_validation_leaves_the_base_unchanged_and_gradients_intact(base, backend, tmp_path):
    """bitsandbytes repacks 4-bit weights at the first evaluation on a CPU: scales are rounded, gradients are lost."""
    modules = []
    for validates in (True, False):
        module = Phi3LoRAModule(base, dtype="bfloat16", quantization="nf4",
                                lora={"backend": backend, "lora_dropout": 0.0})  # fmt: skip
        synthetic.randomised(module)
        if validates:
            synthetic.trainer(tmp_path, precision="bf16-mixed").validate(
                module, synthetic.loader([BATCH]), verbose=False
            )
        with module.train().autocast():
            loss, _ = module.compute_loss(module(BATCH), module.head, BATCH)
        modules.append([loss, *torch.autograd.grad(loss, list(module.trained_parameters()))])
    assert all(map(torch.equal, *modules))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_of_a_fresh_adapter_is_the_quantised_base(base, kind):
    batch = synthetic.pairs_of([[synthetic.pair(9, 4, 3, seed) for seed in range(2)]])
    module = Phi3LoRAModule(base, quantization=kind, lora={"lora_dropout": 0.0}, objective={"name": "dpo"})
    module.configure_model()
    with module.train().autocast():
        loss, _ = module.compute_loss(module(batch), module.head, batch)
    assert loss.item() == pytest.approx(2 * math.log(2), rel=1e-3)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, list(module.trained_parameters())))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_the_adapter_alone(base, kind, tmp_path):
    module = Phi3LoRAModule(base, quantization=kind, lora={"backend": "loralib"})
    module.configure_model()
    trainer = synthetic.trainer(tmp_path, max_steps=2)
    trainer.fit(module, synthetic.loader([BATCH]), synthetic.loader([BATCH]))
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert len(state) == len(list(module.trained_parameters()))
    again = Phi3LoRAModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    with module.autocast():
        assert torch.equal(again.eval()(BATCH), module.eval()(BATCH))
