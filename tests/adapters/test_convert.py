"""Conversion between the tensors of loralib and PEFT: exact both ways, and opened by PEFT itself."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

import synthetic
from adapters.conftest import frozen_base, logits, randomise, trained
from phi3_lightning.adapters import attach, convert, targets
from phi3_lightning.adapters.adapter import PeftForm
from phi3_lightning.config import LoRA
from phi3_lightning.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EVERYWHERE = ["embed_tokens", "qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
SECTIONS = {
    "all": {},
    "slices": {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
    "one slice": {"target_modules": ["k_proj"]},
    "embedding": {"target_modules": EVERYWHERE},
    "ranks": {"rank_pattern": {"o_proj": 1, "gate_up_proj": 8}, "alpha_pattern": {"o_proj": 2, "gate_up_proj": 16}},
    "scales": {"alpha_pattern": {"o_proj": 2, "down_proj": 64}},
    "rslora": {"use_rslora": True},
}


def section(**options) -> LoRA:
    return LoRA(**{"backend": "loralib", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0} | options)


def loralib_state(found: list[targets.Target], model, seed: int = 3) -> dict[str, torch.Tensor]:
    """Random tensors of loralib's shapes."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for target in found:
        layer = model.get_submodule(target.path)
        inputs = layer.num_embeddings if target.embedding else layer.in_features
        shapes = (len(target.adapted) * target.r, inputs), (sum(target.adapted.values()), target.r)
        state |= {
            f"{target.path}.lora_{h}": torch.randn(s, generator=generator) for h, s in zip("AB", shapes, strict=True)
        }
    return state


@pytest.fixture(params=[{}, {"num_key_value_heads": 4}], ids=["gqa", "equal"])
def base(request, tmp_path) -> str:
    return synthetic.save_tiny(tmp_path / "base", **request.param)


@pytest.mark.parametrize("patterns", [False, True])
@pytest.mark.parametrize("name", SECTIONS)
def test_a_round_trip_is_exact(base, name, patterns):
    model = frozen_base(base)
    found = targets.resolve(model, section(**SECTIONS[name]))
    state = loralib_state(found, model)
    form = convert.to_peft(state, found, ["any"], patterns=patterns)
    again = convert.from_peft(form, found, "the form")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


def test_a_fresh_adapter_survives_a_round_trip(base):
    model = frozen_base(base)
    found = targets.resolve(model, section(**SECTIONS["slices"]))
    state = {key: tensor * (0 if "lora_B" in key else 1) for key, tensor in loralib_state(found, model).items()}
    again = convert.from_peft(convert.to_peft(state, found, ["any"]), found, "the form")
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("name", SECTIONS)
def test_the_lora_delta_is_the_same_matrix(base, name):
    """The delta follows from plain algebra: scale x B x A of each slice, on its rows."""
    model = frozen_base(base)
    found = targets.resolve(model, section(**SECTIONS[name]))
    state = loralib_state(found, model)
    form = convert.to_peft(state, found, ["any"])
    for target in found:
        a, b = (form.tensors[key] for key in convert.peft_keys(target))
        whole = form.config.lora_alpha / form.config.r * b @ a
        down, up = (state[f"{target.path}.lora_{half}"] for half in "AB")
        downs, ups = iter(down.split(target.r)), iter(up.split(list(target.adapted.values())))
        for (rows, on), part in zip(
            zip(target.slices.values(), target.enabled, strict=True),
            whole.split(list(target.slices.values())),
            strict=True,
        ):
            expected = target.scaling * next(ups) @ next(downs) if on else torch.zeros(rows, whole.shape[1])
            torch.testing.assert_close(part, expected)


def open_in_peft(form: PeftForm, folder, base: str) -> PeftModel:
    form.config.save_pretrained(folder)
    save_file(form.tensors, folder / "adapter_model.safetensors")
    return PeftModel.from_pretrained(frozen_base(base), folder)


@pytest.mark.parametrize("name", ["ranks", "slices", "scales"])
def test_the_pattern_form_is_made_on_request_and_opens_in_peft(base, tmp_path, name):
    model = frozen_base(base)
    adapter = attach(model, section(**SECTIONS[name]))
    randomise(adapter.parameters())
    names = targets.short_names(model, [target.path for target in adapter.targets])
    form = convert.to_peft(adapter.state_dict(), adapter.targets, names, patterns=True)
    assert form.config.rank_pattern
    for target in adapter.targets:
        assert form.tensors[convert.peft_keys(target)[0]].shape[0] == target.r * sum(target.enabled)
    torch.testing.assert_close(logits(open_in_peft(form, tmp_path, base)), logits(model))
    assert adapter.to_peft().config.rank_pattern == {}


@pytest.mark.parametrize("more", [0, 3])
def test_an_unsliced_peft_adapter_becomes_slices(base, more):
    """Each slice gets the whole A, and its own rows of B; the rank of a slice may be larger."""
    plain = get_peft_model(frozen_base(base), LoraConfig(r=4, lora_alpha=8, target_modules=EVERYWHERE[1:]))
    randomise(trained(plain).values())
    tensors = {name.replace(".default", ""): tensor.detach() for name, tensor in trained(plain).items()}
    model = frozen_base(base)
    adapter = attach(model, section(r=4 + more, lora_alpha=2 * (4 + more)))
    adapter.load_peft(PeftForm(plain.peft_config["default"], tensors), "PEFT")
    torch.testing.assert_close(logits(model), logits(plain.eval()))
    form = adapter.to_peft()
    back = convert.from_peft(form, adapter.targets, "again")
    assert all(torch.equal(back[key], tensor) for key, tensor in adapter.state_dict().items())


def plain_form(base: str, **options) -> PeftForm:
    plain = get_peft_model(
        frozen_base(base), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj"]} | options)
    )
    randomise(trained(plain).values())
    tensors = {name.replace(".default", ""): tensor.detach() for name, tensor in trained(plain).items()}
    return PeftForm(plain.peft_config["default"], tensors)


WRONG = {
    "a LoRA delta of all that is none of each": ({"r": 12, "lora_alpha": 24}, {}, "no LoRA delta of rank 4 for each"),
    "a slice that is off": ({}, {"target_modules": ["q_proj"]}, "no LoRA delta of rank 4 for each"),
    "two slices that are on": ({}, {"target_modules": ["q_proj", "v_proj"]}, "enable all, or set backend to peft"),
    "a larger rank": ({"r": 6, "lora_alpha": 12}, {}, "has rank 6 and model.lora gives its slices 4"),
    "another scale": ({"lora_alpha": 16}, {}, "scaled by 4 and model.lora scales it by 2; its r is 4"),
    "other layers": ({"target_modules": ["o_proj"]}, {}, "other layers than model.lora asks for: missing"),
    "a larger rank elsewhere": (
        {"target_modules": ["o_proj"], "r": 6, "lora_alpha": 12}, {"target_modules": ["o_proj"]},
        "has rank 6 and model.lora gives it 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_conversion_that_is_not_exact_is_refused(tiny_base, name):
    theirs, ours, message = WRONG[name]
    found = targets.resolve(frozen_base(tiny_base), section(**{"target_modules": ["qkv_proj"]} | ours))
    with pytest.raises(CheckpointError, match=message) as caught:
        convert.from_peft(plain_form(tiny_base, **theirs), found, "model.lora.init_from: there")
    assert str(caught.value).startswith("model.lora.init_from: there")


def test_an_adapter_of_a_base_with_other_heads_is_refused(tiny_base, tmp_path):
    other = synthetic.save_tiny(tmp_path / "other", num_key_value_heads=4)
    found = targets.resolve(frozen_base(tiny_base), section(target_modules=["qkv_proj"]))
    with pytest.raises(CheckpointError, match="has 96 rows, and in this model 64"):
        convert.from_peft(plain_form(other), found, "there")
