"""Which base models are accepted, and that they equal those of transformers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, Phi3ForCausalLM, PhiConfig, PhimoeConfig

import synthetic
from phi3_lightning.adapters.peft_backend import PeftAdapter
from phi3_lightning.config import LoRA
from phi3_lightning.errors import ModelError
from phi3_lightning.model import base

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 4.0, 8.0, 12.0],
    "rope_theta": 10000.0,
}


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert [
        name for name in one if not torch.equal(one[name], other[name]) or one[name].dtype != other[name].dtype
    ] == []


def edited(tiny_base: str, folder: Path, **changes) -> str:
    """Copy the base with a changed config.json."""
    folder.mkdir()
    for file in Path(tiny_base).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pretrained_base_is_what_transformers_loads_and_frozen(tiny_base, dtype):
    model = base.load(tiny_base, dtype=dtype)
    assert_same(weights_of(model), weights_of(Phi3ForCausalLM.from_pretrained(tiny_base, dtype=getattr(torch, dtype))))
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_random_base_needs_config_json_alone_and_is_the_same_every_time(tmp_path, dtype, tied):
    synthetic.tiny_config(tie_word_embeddings=tied).save_pretrained(tmp_path)
    torch.manual_seed(1)
    first = base.load(str(tmp_path), init="random", dtype=dtype)
    torch.manual_seed(2)
    second = base.load(str(tmp_path), init="random", dtype=dtype)
    assert_same(weights_of(first), weights_of(second))
    assert {parameter.dtype for parameter in first.parameters()} == {getattr(torch, dtype)}
    assert (first.lm_head.weight is first.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rope", [None, LONGROPE])
def test_buffers_of_a_random_base_are_those_of_the_plain_construction(tmp_path, dtype, rope):
    changes = {} if rope is None else {"rope_parameters": rope}
    config = synthetic.tiny_config(**changes)
    config.save_pretrained(tmp_path)
    ours = base.load(str(tmp_path), init="random", dtype=dtype)
    buffers = dict(ours.named_buffers())
    assert buffers
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}
    assert_same(buffers, dict(Phi3ForCausalLM(config).named_buffers()))


def test_a_random_base_is_spread_as_the_plain_construction(tmp_path):
    config = synthetic.tiny_config()
    config.save_pretrained(tmp_path)
    ours, plain = base.load(str(tmp_path), init="random", dtype="float32"), Phi3ForCausalLM(config)
    for (name, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if one.ndim == 1:
            assert torch.equal(one, other), name  # norms start at one
        else:  # of n values, a standard deviation is known to 1 / sqrt(2 n); four times that, for either
            assert one.std().item() == pytest.approx(other.std().item(), rel=8 / (2 * one.numel()) ** 0.5), name


def test_a_random_base_leaves_the_global_generator_alone(tmp_path):
    synthetic.tiny_config().save_pretrained(tmp_path)
    before = torch.get_rng_state()
    base.load(str(tmp_path), init="random")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_the_embedding_is_never_resized(tiny_base, tmp_path, init):
    folder = edited(tiny_base, tmp_path / "padded", pad_token_id=synthetic.VOCABULARY - 1)
    model = base.load(folder, init=init)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == synthetic.VOCABULARY


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"model\.base: .*has no config\.json"):
        base.read_config(str(tmp_path))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"model\.base: no configuration for .*missing"):
        base.read_config(str(tmp_path / "missing"))


@pytest.mark.parametrize("broken", ["{", ""])
def test_a_broken_config_is_named(tmp_path, broken):
    (tmp_path / "config.json").write_text(broken)
    with pytest.raises(ModelError, match=r"model\.base: "):
        base.read_config(str(tmp_path))


def test_a_folder_without_safetensors_is_named(tmp_path):
    synthetic.tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no safetensors weights.*model\.init: random"):
        base.load(str(tmp_path))


def test_a_pickle_of_weights_is_not_read(tmp_path):
    synthetic.tiny_config().save_pretrained(tmp_path)
    torch.save(Phi3ForCausalLM(synthetic.tiny_config()).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="has no safetensors weights"):
        base.load(str(tmp_path))


FOREIGN = [
    ({"model_type": "phi3small", "architectures": ["Phi3SmallForCausalLM"]}, "Phi-3-small"),
    ({"model_type": "phi3_v", "architectures": ["Phi3VForCausalLM"]}, "Phi-3-vision"),
    (PhimoeConfig(architectures=["PhimoeForCausalLM"]).to_dict(), "mixture of experts"),
    ({"model_type": "phi4mm", "architectures": ["Phi4MMForCausalLM"]}, "Phi-4-multimodal"),
    (PhiConfig(architectures=["PhiForCausalLM"]).to_dict(), "Phi-1 and Phi-2"),
    (LlamaConfig(architectures=["LlamaForCausalLM"]).to_dict(), "another architecture"),
    ({"model_type": "phi3", "architectures": ["Phi3ForSequenceClassification"]}, "another architecture"),
    ({}, "another architecture"),
]


@pytest.mark.parametrize(("config", "reason"), FOREIGN)
def test_other_architectures_are_refused_by_name(tmp_path, config, reason):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"{config.get('model_type')}.*{reason}.*Phi-3-mini"):
        base.load(str(tmp_path))


def test_a_config_without_architectures_is_accepted(tiny_base, tmp_path):
    folder = edited(tiny_base, tmp_path / "unnamed", architectures=None)
    assert base.read_config(folder).model_type == "phi3"


def test_remote_code_is_never_imported(tiny_base, tmp_path):
    auto_map = {"AutoConfig": "modeling_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    folder = edited(tiny_base, tmp_path / "remote", auto_map=auto_map)
    (Path(folder) / "modeling_phi3.py").write_text("raise RuntimeError('remote code ran')")
    for init in ("pretrained", "random"):
        model = base.load(folder, init=init)
        assert type(model) is Phi3ForCausalLM


def su_config(folder: Path) -> str:
    """Write a 128k configuration as first published."""
    config = synthetic.tiny_config().to_dict()
    config.pop("rope_parameters")
    config |= {"architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 16, "rope_theta": 10000.0}
    config["rope_scaling"] = {"type": "su", **{key: LONGROPE[key] for key in ("short_factor", "long_factor")}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_the_rope_type_su_is_longrope(tmp_path):
    synthetic.tiny_config(rope_parameters=LONGROPE, original_max_position_embeddings=16).save_pretrained(tmp_path)
    published, present = su_config(tmp_path / "su"), str(tmp_path)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        old, new = (
            base.load(f, init="random", dtype="float32")(ids, use_cache=False).logits for f in (published, present)
        )
        synthetic.tiny_config().save_pretrained(tmp_path)
        plain = base.load(present, init="random", dtype="float32")(ids, use_cache=False).logits
    assert torch.equal(old, new)
    assert not torch.equal(old, plain)


@pytest.mark.parametrize("length", [8, 32, 60])
def test_sliding_window_is_the_same_under_every_kernel(tmp_path, length):
    folder = synthetic.save_tiny(tmp_path / "base", sliding_window=8)
    ids = torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(0))

    def hidden(folder: str, kernel: str) -> torch.Tensor:
        model = base.load(folder, dtype="float32", attn_implementation=kernel)
        with torch.no_grad():
            return model.model(ids, use_cache=False).last_hidden_state

    sdpa, eager = hidden(folder, "sdpa"), hidden(folder, "eager")
    # two layers of float32 products of at most 64 terms, on normalised states of size about 1
    torch.testing.assert_close(sdpa, eager, rtol=0, atol=2 * 64 * torch.finfo(torch.float32).eps)
    whole = hidden(edited(folder, tmp_path / "whole", sliding_window=None), "sdpa")
    assert torch.allclose(whole, sdpa, atol=1e-4) == (length <= 8)  # the window matters beyond its length


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_automatic_kernel_attends_within_documents(device):
    assert base.choose_attention("auto", torch.device(device)) == "documents"


def test_flash_attention_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr(base, "is_flash_attn_2_available", lambda: True)
    with pytest.raises(ModelError, match=r"model\.attn_implementation: flash_attention_2 .*cpu; use documents"):
        base.choose_attention("flash_attention_2", torch.device("cpu"))


def test_an_empty_model_has_every_layer_and_no_weight(tiny_base):
    skeleton = base.skeleton(base.read_config(tiny_base))
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    expected = {name: tuple(p.shape) for name, p in Phi3ForCausalLM.from_pretrained(tiny_base).named_parameters()}
    assert {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()} == expected


def test_the_fingerprint_is_the_same_for_the_same_weights(tiny_base):
    assert base.fingerprint(base.load(tiny_base)) == base.fingerprint(base.load(tiny_base))


def test_the_fingerprint_tells_bases_apart(tiny_base):
    prints = {
        base.fingerprint(base.load(tiny_base, dtype="float32")),
        base.fingerprint(base.load(tiny_base, dtype="bfloat16")),
        base.fingerprint(base.load(tiny_base, init="random", dtype="float32")),
    }
    assert len(prints) == 3


def test_the_fingerprint_tells_types_apart_even_where_values_are_equal(tiny_base):
    model = base.load(tiny_base, dtype="bfloat16")
    before = base.fingerprint(model)
    assert base.fingerprint(model.float()) != before


@pytest.mark.parametrize("place", [0, -1])
def test_the_fingerprint_sees_one_changed_value_at_a_sampled_place(tiny_base, place):
    model = base.load(tiny_base)
    before = base.fingerprint(model)
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        old = flat[place].item()
        flat[place] = old + 1
        assert base.fingerprint(model) != before, name
        flat[place] = old
    assert base.fingerprint(model) == before


def test_the_fingerprint_ignores_adapters(tiny_base):
    model = base.load(tiny_base)
    before = base.fingerprint(model)
    adapter = PeftAdapter(model, LoRA())
    assert base.fingerprint(model, adapter.base_name) == before
    assert base.fingerprint(model) != before
    assert base.fingerprint(adapter.detach()) == before
