"""The merged model is base plus adapter, summed in float32 and rounded once, whatever the adapter's options."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Phi3ForCausalLM

import synthetic
from export.conftest import ADAPTERS, BASES, peft_model
from phi3_lightning.adapters.adapter import PeftForm
from phi3_lightning.errors import ModelError
from phi3_lightning.export.base_files import BaseWeights
from phi3_lightning.export.merge import Merger, write_merged
from phi3_lightning.model.base import read_config, skeleton

IDS = torch.arange(3, 30)[None]

# PEFT warns that a tied weight may become two, which is tested here
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


def merge(base, form, folder, dtype=None, size="2GB"):
    folder.mkdir()
    weights = BaseWeights(str(base), None)
    written = write_merged(weights, Merger(skeleton(read_config(str(base))), form), folder, dtype, size)
    assert json.loads((folder / "config.json").read_text()).get("dtype") == str(written).removeprefix("torch.")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=written)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_merged_model_has_the_logits_of_peft(base_folder, tmp_path, kind, adapter):
    base = base_folder(**BASES[kind])
    live, form = peft_model(Phi3ForCausalLM.from_pretrained(base), **ADAPTERS[adapter])
    merged = merge(base, form, tmp_path / "merged")
    with torch.no_grad():
        expected, found = live(IDS, use_cache=False).logits, merged(IDS, use_cache=False).logits
        with live.disable_adapter():
            untouched = live(IDS, use_cache=False).logits
    # two layers of sums over at most 64 products in float32, in another order: 64 x 6e-8 of values around 1
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-6)
    assert (untouched - expected).abs().max() > 0.01


def test_the_sum_is_rounded_once(base_folder, tmp_path):
    base = base_folder(torch.bfloat16)
    _, form = peft_model(Phi3ForCausalLM.from_pretrained(base, dtype=torch.bfloat16))
    merge(base, form, tmp_path / "merged")
    name = "model.layers.1.mlp.down_proj"
    before = load_file(base / "model.safetensors")[f"{name}.weight"]
    a, b = (form.tensors[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
    exact = before.float() + 2.0 * (b @ a)
    found = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(found, exact.to(torch.bfloat16))
    twice = before + (2.0 * (b @ a)).to(torch.bfloat16)
    assert not torch.equal(found, twice)  # the result if the delta were rounded first


@pytest.mark.parametrize("asked", [torch.float32, torch.float16, torch.bfloat16])
def test_the_dtype_is_as_requested_or_that_of_the_base(base_folder, tmp_path, asked):
    base = base_folder(torch.bfloat16)
    _, form = peft_model(Phi3ForCausalLM.from_pretrained(base, dtype=torch.bfloat16))
    merge(base, form, tmp_path / "as asked", asked)
    merge(base, form, tmp_path / "as base")
    for folder, dtype in (("as asked", asked), ("as base", torch.bfloat16)):
        assert {t.dtype for t in load_file(tmp_path / folder / "model.safetensors").values()} == {dtype}


def test_weights_without_an_adapter_stay_bit_identical(base_folder, tmp_path):
    base = base_folder(torch.bfloat16)
    _, form = peft_model(Phi3ForCausalLM.from_pretrained(base, dtype=torch.bfloat16), target_modules=["o_proj"])
    merge(base, form, tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)}
    assert after["model.embed_tokens.weight"].shape[0] == synthetic.VOCABULARY
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == synthetic.VOCABULARY


@pytest.mark.parametrize("sharded_base", [False, True])
def test_large_models_come_in_several_files(base_folder, tmp_path, sharded_base):
    base = base_folder()
    model = Phi3ForCausalLM.from_pretrained(base)
    if sharded_base:
        (base / "model.safetensors").unlink()
        model.save_pretrained(base, max_shard_size="30KB")
    live, form = peft_model(model)
    merged = merge(base, form, tmp_path / "merged", size="20KB")
    files = list((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 30_000 for file in files)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, live(IDS).logits, rtol=0, atol=4e-6)


def test_tied_embeddings_stay_tied_unless_the_adapter_separates_them(base_folder, tmp_path):
    base = base_folder(tie_word_embeddings=True)
    for name, options, tied in (("shared", {}, True), ("parted", {"target_modules": ["embed_tokens"]}, False)):
        _, form = peft_model(Phi3ForCausalLM.from_pretrained(base), **options)
        merge(base, form, tmp_path / name)
        assert ("lm_head.weight" in load_file(tmp_path / name / "model.safetensors")) is not tied
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is tied


def test_the_configuration_is_the_bases_own(base_folder, tmp_path):
    base = base_folder()
    path = base / "config.json"
    foreign = {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}, "use_cache": False, "own": 1}
    path.write_text(json.dumps(json.loads(path.read_text()) | foreign))
    _, form = peft_model(Phi3ForCausalLM.from_pretrained(base))
    merge(base, form, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "auto_map" not in config  # code of the repository is not exported
    assert (config["use_cache"], config["own"]) == (True, 1)


def test_a_quantised_base_is_refused(base_folder):
    base = base_folder()
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(ModelError, match=r"are quantised.*merge into the base they were made from"):
        BaseWeights(str(base), None)


def test_a_base_without_weights_is_refused(base_folder):
    base = base_folder()
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        BaseWeights(str(base), None)


def test_a_sum_that_is_not_finite_is_refused(base_folder, tmp_path):
    base = base_folder()
    _, form = peft_model(Phi3ForCausalLM.from_pretrained(base))
    name = next(name for name in form.tensors if "lora_B" in name)
    broken = PeftForm(form.config, form.tensors | {name: torch.full_like(form.tensors[name], float("nan"))})
    with pytest.raises(ModelError, match="not finite"):
        merge(base, broken, tmp_path / "merged")


@pytest.mark.parametrize("change", ["dropped", "renamed"])
def test_an_adapter_that_does_not_fit_is_refused(base_folder, tmp_path, change):
    base = base_folder()
    _, form = peft_model(Phi3ForCausalLM.from_pretrained(base))
    name = next(name for name in form.tensors if "lora_B" in name)
    tensors = {key: tensor for key, tensor in form.tensors.items() if key != name}
    tensors |= {name.replace("layers.0", "layers.9"): form.tensors[name]} if change == "renamed" else {}
    with pytest.raises(ModelError, match="does not fit the base"):
        merge(base, PeftForm(form.config, tensors), tmp_path / "merged")


def test_another_shape_in_the_files_is_refused(base_folder, tmp_path):
    base = base_folder()
    tensors = load_file(base / "model.safetensors")
    _, form = peft_model(Phi3ForCausalLM.from_pretrained(base))
    tensors["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(16, 16)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"o_proj\.weight: .* has shape \(16, 16\), its config \(32, 32\)"):
        merge(base, form, tmp_path / "merged")
