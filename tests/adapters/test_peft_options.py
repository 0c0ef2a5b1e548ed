"""All of LoraConfig: DoRA, initialisations, patterns and modules_to_save, against plain PEFT."""

import copy
from collections import Counter

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

import synthetic
from adapters.conftest import IDS, frozen_base, logits, logits_and_gradients, randomise, trained
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.adapters import attach
from phi3_lightning.config import LoRA
from phi3_lightning.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

OPTIONS = {
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"qkv_proj": 16}},
    "dora and patterns": {"use_dora": True, "rank_pattern": {"o_proj": 2}},
    "one block": {"layers_to_transform": [1]},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "expression": {"target_modules": r".*\.layers\.0\..*(qkv|down)_proj"},
    "whole": {"modules_to_save": ["lm_head", "norm"]},
    "whole embedding": {"modules_to_save": ["embed_tokens"], "use_dora": True},
}


def section(**options) -> LoRA:
    return LoRA(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0} | options)


def plain(base: str, lora: LoRA):
    """The same adapter by PEFT itself; norm is given as a path, or PEFT would match every layer's norm too."""
    options = {key: getattr(lora, key) for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")}
    options |= {key: getattr(lora, key) for key in ("rank_pattern", "alpha_pattern", "layers_to_transform")}
    options |= {key: getattr(lora, key) for key in ("target_modules", "exclude_modules")}
    whole = [name.replace("norm", "model.norm") for name in lora.modules_to_save or []] or None
    return get_peft_model(frozen_base(base), LoraConfig(modules_to_save=whole, task_type="CAUSAL_LM", **options))


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_and_gradients_are_those_of_plain_peft(tiny_base, name):
    lora = section(**OPTIONS[name])
    ours, theirs = frozen_base(tiny_base), plain(tiny_base, lora)
    attach(ours, lora)
    assert [f"base_model.model.{key}" for key in trained(ours)] == list(trained(theirs))
    for model in (ours, theirs):
        randomise(trained(model).values())
    (answers, gradients), (expected, expected_gradients) = map(logits_and_gradients, (ours, theirs))
    torch.testing.assert_close(answers, expected)
    for gradient, other in zip(gradients.values(), expected_gradients.values(), strict=True):
        torch.testing.assert_close(gradient, other)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", OPTIONS)
def test_an_export_opens_in_plain_peft_with_one_rank(tiny_base, tmp_path, name):
    model = frozen_base(tiny_base)
    adapter = attach(model, section(**OPTIONS[name]))
    randomise(adapter.parameters())
    form = adapter.to_peft()
    assert (form.config.rank_pattern, form.config.alpha_pattern) == ({}, {})
    form.config.save_pretrained(tmp_path)
    save_file(form.tensors, tmp_path / "adapter_model.safetensors")
    opened = PeftModel.from_pretrained(frozen_base(tiny_base), tmp_path)
    torch.testing.assert_close(logits(opened.eval()), logits(model.eval()))
    assert not torch.allclose(logits(opened), logits(frozen_base(tiny_base)), atol=1e-3)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_switched_off_or_detached_adapter_changes_nothing(tiny_base, name, dtype):
    model = frozen_base(tiny_base, dtype)
    before, expected = copy.deepcopy(model.state_dict()), logits(model)
    adapter = attach(model, section(**OPTIONS[name]))
    assert torch.equal(logits(model), expected)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    assert {id(parameter) for parameter in adapter.parameters()} == {id(p) for p in trained(model).values()}
    randomise(adapter.parameters())
    assert not torch.equal(logits(model), expected)
    with adapter.disabled():
        assert torch.equal(logits(model), expected)
    adapter.detach()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


# ---------------------------------------------------------------------- DoRA


def test_a_fresh_dora_changes_nothing_on_a_bfloat16_base_under_autocast(tiny_base):
    bare, model, theirs = (frozen_base(tiny_base, torch.bfloat16) for _ in range(3))
    attach(model, section(use_dora=True))
    theirs = get_peft_model(theirs, LoraConfig(target_modules="all-linear", use_dora=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(model), logits(bare))
        # negative control: PEFT rounds magnitudes, and the norms that it divides by, to bfloat16
        assert not torch.equal(logits(theirs), logits(bare))


# ---------------------------------------------------------------------- initialisations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal"])
def test_an_initialisation_changes_neither_base_nor_logits(tiny_base, start, dtype):
    model = frozen_base(tiny_base, dtype)
    before, expected = copy.deepcopy(model.state_dict()), logits(model)
    adapter = attach(model, section(init_lora_weights=start, target_modules=["embed_tokens", "qkv_proj", "o_proj"]))
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    if start == "orthogonal":  # the product of A and B is 0 up to float32 rounding
        assert all(parameter.abs().max() > 0 for name, parameter in trained(model).items() if "embed" not in name)
        for layer in adapter._layers():
            for down, up in zip(layer.lora_A.values(), layer.lora_B.values(), strict=True):
                product = up.weight @ down.weight
                bound = 4 * 2.0**-24 * (up.weight.abs() @ down.weight.abs()) * 16  # sums of 4 terms, QR of 4 x 4
                assert (product.abs() <= bound).all()
    else:
        assert torch.equal(logits(model), expected)


def test_negative_control_plain_pissa_rewrites_the_base(tiny_base):
    model = frozen_base(tiny_base)
    before = copy.deepcopy(model.state_dict())
    get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights="pissa"))
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert not all(torch.equal(after[name], value) for name, value in before.items())


def test_gaussian_initialisation_is_that_of_peft(tiny_base):
    model, theirs = frozen_base(tiny_base), frozen_base(tiny_base)
    torch.manual_seed(4)
    attach(model, section(init_lora_weights="gaussian"))
    torch.manual_seed(4)
    names = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    theirs = get_peft_model(theirs, LoraConfig(r=4, target_modules=names, init_lora_weights="gaussian"))
    assert all(map(torch.equal, trained(model).values(), trained(theirs).values()))


def test_init_lora_weights_false_changes_the_logits(tiny_base):
    model = frozen_base(tiny_base)
    expected = logits(model)
    attach(model, section(init_lora_weights=False))
    assert not torch.equal(logits(model), expected)


# ---------------------------------------------------------------------- modules_to_save


def test_modules_to_save_matches_whole_names(tiny_base):
    """PEFT matches 'norm' with the end of 'input_layernorm' as well."""
    model = frozen_base(tiny_base)
    assert attach(model, section(modules_to_save=["norm"])).modules_to_save == ["model.norm"]
    theirs = get_peft_model(
        frozen_base(tiny_base), LoraConfig(target_modules=["o_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    )
    assert len([name for name in trained(theirs) if "norm.modules_to_save" in name]) == 5


def test_every_parameter_has_a_base_name_or_a_role(tiny_base):
    model = frozen_base(tiny_base)
    names = {name for name, _ in model.named_parameters()}
    adapter = attach(model, section(use_dora=True, modules_to_save=["lm_head"]))
    assert {adapter.base_name(name) for name, p in model.named_parameters() if not p.requires_grad} == names
    assert Counter(map(adapter.role, trained(model))) == {
        "lora_A": 8, "lora_B": 8, "magnitude": 8, "modules_to_save": 1
    }  # fmt: skip


REFUSED = {
    "a name that is not there": ({"modules_to_save": ["head"]}, "head matches no layer; there are down_proj, "),
    "a container": ({"modules_to_save": ["mlp"]}, "mlp matches no layer"),
    "a target": ({"modules_to_save": ["o_proj"]}, "carries an adapter; take it from target_modules"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_modules_to_save_are_refused_before_loading_weights(tmp_path, name):
    options, message = REFUSED[name]
    synthetic.tiny_config().save_pretrained(tmp_path)  # config.json alone
    with pytest.raises(ModelError, match=rf"model\.lora\.modules_to_save: .*{message}"):
        Phi3LoRAModule(str(tmp_path), lora=options).check_base()


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_one_of_two_tied_modules_to_save_is_refused(tmp_path, name):
    base = synthetic.save_tiny(tmp_path / "base", tie_word_embeddings=True)
    with pytest.raises(ModelError, match="share one weight"):
        attach(frozen_base(base), section(modules_to_save=[name]))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_modules_to_save_train_in_float32_and_are_restored(tmp_path, precision):
    base = synthetic.save_tiny(tmp_path / "base", torch.bfloat16)
    batch = synthetic.batch_of([[synthetic.document(12, 6, seed)] for seed in range(2)])
    options = {
        "lora": {"r": 2, "lora_dropout": 0.0, "modules_to_save": ["lm_head", "embed_tokens", "norm"], "use_dora": True},
        "optimizer": {"lr": 1e-5}, "schedule": {"name": "constant", "warmup": 0},
    }  # fmt: skip
    module = Phi3LoRAModule(base, **options)
    module.configure_model()
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    trainer = synthetic.trainer(tmp_path, max_steps=3, precision=precision)
    trainer.fit(module, synthetic.loader([batch]))
    for name, parameter in module.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
        assert torch.equal(parameter, start[name]) != parameter.requires_grad or "lora_A" in name, name
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    again = Phi3LoRAModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    with module.autocast():
        assert torch.equal(again.eval()(batch), module.eval()(batch))


def test_modules_to_save_return_the_dtype_of_the_base(tiny_base):
    model = frozen_base(tiny_base, torch.bfloat16)
    attach(model, section(modules_to_save=["lm_head", "embed_tokens", "norm"]))
    hidden = model.model(IDS, use_cache=False).last_hidden_state
    assert (hidden.dtype, model.lm_head(hidden).dtype) == (torch.bfloat16, torch.bfloat16)
