"""The PEFT backend against plain PEFT."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import Phi3ForCausalLM

from adapters.conftest import IDS, frozen_base, logits_and_gradients, randomise, trained
from phi3_lightning.adapters.dropout import Dropout
from phi3_lightning.adapters.peft_backend import PeftAdapter
from phi3_lightning.config import LoRA

# get_peft_model calls gradient checkpointing of transformers by its old name
ASKS_BY_AN_OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

OPTIONS = {
    "plain": LoRA(r=4, lora_alpha=8, lora_dropout=0.0),
    "dropout": LoRA(r=4, lora_alpha=8, lora_dropout=0.3),
    "rslora": LoRA(r=4, lora_alpha=8, lora_dropout=0.0, use_rslora=True),
    "a fraction as alpha": LoRA(r=4, lora_alpha=2.5, lora_dropout=0.0),
    "some layers": LoRA(r=2, lora_alpha=8, lora_dropout=0.0, target_modules=["qkv_proj", "down_proj"]),
}


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
    for layer in theirs.modules():
        if isinstance(layer, LoraLayer) and config.lora_dropout:
            layer.lora_dropout["default"] = Dropout(config.lora_dropout)  # the same numbers for the same seed
    for model in (ours, theirs):
        randomise(trained(model).values())
    (logits, gradients), (expected, expected_gradients) = map(logits_and_gradients, (ours, theirs))
    # the delta is added before rounding, and not after: float32's own tolerance
    torch.testing.assert_close(logits, expected)
    for gradient, expected_gradient in zip(gradients.values(), expected_gradients.values(), strict=True):
        torch.testing.assert_close(gradient, expected_gradient)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@ASKS_BY_AN_OLD_NAME
def test_initial_weights_are_those_of_plain_peft_with_the_same_seed(tiny_base, dtype):
    config = OPTIONS["plain"]
    ours, theirs = frozen_base(tiny_base, dtype), frozen_base(tiny_base, dtype)
    torch.manual_seed(5)
    PeftAdapter(ours, config)
    torch.manual_seed(5)
    peft_config = LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=config.target_modules)
    theirs = get_peft_model(theirs, peft_config)
    assert all(map(torch.equal, trained(ours).values(), trained(theirs).values()))


def test_under_autocast_the_input_of_dora_is_not_cast_back_and_forth(tiny_base):
    model = frozen_base(tiny_base, torch.bfloat16)
    adapter = PeftAdapter(model, LoRA(r=4, lora_alpha=8, lora_dropout=0.0, use_dora=True))
    randomise(adapter.parameters())
    seen = []
    layer = model.model.layers[0].self_attn.qkv_proj
    layer.lora_A["default"].register_forward_pre_hook(
        lambda _, inputs: seen.extend(x.dtype for x in inputs if x.ndim == 3)  # and not the unit matrix of DoRA's norm
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(IDS, use_cache=False)
    model(IDS, use_cache=False)
    assert seen == [torch.bfloat16, torch.float32]


@ASKS_BY_AN_OLD_NAME
def test_an_export_opens_in_plain_peft(tiny_base, tmp_path):
    model, adapter = attached(tiny_base, OPTIONS["rslora"])
    randomise(adapter.parameters())
    form = adapter.to_peft()
    form.config.save_pretrained(tmp_path)
    save_file(form.tensors, tmp_path / "adapter_model.safetensors")
    plain = PeftModel.from_pretrained(frozen_base(tiny_base), tmp_path)
    torch.testing.assert_close(plain.eval()(IDS).logits, model.eval()(IDS).logits)
