"""EVA initialisation: PEFT's own directions, computed once, and only for a fresh adapter."""

import re
import warnings

import lightning.pytorch as pl
import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from transformers import Phi3ForCausalLM

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.errors import ConfigError

FOUR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def module(base, **lora) -> Phi3LoRAModule:
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "init_lora_weights": "eva", **lora}
    return Phi3LoRAModule(base, dtype="float32", lora=lora)


def batches(supervised: int = 8) -> list:
    return [synthetic.batch_of([[synthetic.document(12, supervised, seed)]], seed) for seed in range(6)]


class RecordStart(pl.Callback):
    """Records the adapter's weights before the first step."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.weights = {n: p.detach().clone() for n, p in pl_module.model.named_parameters() if p.requires_grad}


def fit(folder, model, data, **options) -> dict[str, torch.Tensor]:
    start = RecordStart()
    ckpt_path = options.pop("ckpt_path", None)
    trainer = synthetic.trainer(folder, callbacks=[start], **{"max_epochs": 1} | options)
    trainer.fit(model, synthetic.loader(data), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / "last.ckpt")
    return start.weights


@pytest.fixture
def expected(tiny_base) -> dict[str, torch.Tensor]:
    """PEFT's own initialisation from the same batches."""
    base = Phi3ForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=FOUR, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lora with eva initialization used with low_cpu_mem_usage=False")
        theirs = get_peft_model(base, config)
    data = [{key: batch[key] for key in ("input_ids", "labels")} for batch in batches()]
    initialize_lora_eva_weights(theirs, data, show_progress_bar=False)
    return {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if "lora_A" in name}


def test_the_directions_are_those_of_peft(tiny_base, tmp_path, expected):
    found = fit(tmp_path, module(tiny_base), batches())
    assert len(expected) == 8
    for name, directions in expected.items():
        # a decomposition fixes directions up to float32 rounding: both run the same one
        torch.testing.assert_close(found[name], directions, rtol=0, atol=1e-5)
    assert all(not tensor.any() for name, tensor in found.items() if "lora_B" in name)
    usual = fit(tmp_path, module(tiny_base, init_lora_weights=True), batches())
    assert all((usual[name] - tensor).abs().max() > 0.1 for name, tensor in expected.items())


def test_packed_and_padded_rows_give_the_same_start(tiny_base, tmp_path):
    pairs = [[synthetic.document(12, 8, seed), synthetic.document(9, 5, seed + 9)] for seed in range(3)]
    packed = fit(tmp_path, module(tiny_base), [synthetic.batch_of([pair]) for pair in pairs])
    padded = fit(tmp_path, module(tiny_base), [synthetic.batch_of([[document] for document in pair]) for pair in pairs])
    assert all(torch.equal(packed[name], padded[name]) for name in packed)


def test_each_slice_of_loralib_starts_from_the_directions_of_its_layer(tiny_base, tmp_path, expected):
    pytest.importorskip("loralib")
    targets = ["q_proj", "v_proj", "o_proj"]
    found = fit(tmp_path, module(tiny_base, backend="loralib", target_modules=targets), batches())
    for path, count in (("model.layers.1.self_attn.qkv_proj", 2), ("model.layers.0.self_attn.o_proj", 1)):
        directions = expected[f"{path}.lora_A.default.weight"]
        torch.testing.assert_close(found[f"{path}.lora_A"], directions.repeat(count, 1), rtol=0, atol=1e-5)


def test_every_layer_keeps_its_rank(tiny_base, tmp_path):
    found = fit(tmp_path, module(tiny_base, rank_pattern={"o_proj": 2}), batches())
    assert {tensor.shape[0] for name, tensor in found.items() if "o_proj.lora_A" in name} == {2}
    assert {tensor.shape[0] for name, tensor in found.items() if "qkv_proj.lora_A" in name} == {4}


def test_a_resumed_or_second_fit_keeps_trained_weights(tiny_base, tmp_path):
    first = module(tiny_base)
    fit(tmp_path, first, batches())
    learnt = {name: p.detach().clone() for name, p in first.model.named_parameters() if p.requires_grad}
    again = module(tiny_base)
    restarted = fit(tmp_path / "again", again, batches(), ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
    assert all(torch.equal(restarted[name], tensor) for name, tensor in learnt.items())
    second = fit(tmp_path / "second", first, batches())
    assert all(torch.equal(second[name], tensor) for name, tensor in learnt.items())


def test_embedding_and_head_start_as_usual(tiny_base, tmp_path, expected):
    found = fit(tmp_path, module(tiny_base, target_modules=["embed_tokens", "lm_head", "o_proj"]), batches())
    name = "model.layers.0.self_attn.o_proj.lora_A.default.weight"
    torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"eva: no layer of a decoder block is adapted"):
        fit(tmp_path, module(tiny_base, target_modules=["embed_tokens"]), batches())


def test_batches_with_fewer_tokens_than_directions_are_left_out(tiny_base, tmp_path, expected):
    empty = synthetic.batch_of([[synthetic.document(12, 0, 99)]], 99)
    found = fit(tmp_path, module(tiny_base), [empty, *batches()])
    for name, directions in expected.items():
        torch.testing.assert_close(found[name], directions, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=re.escape("no training batch has 4 supervised tokens")):
        fit(tmp_path, module(tiny_base), batches(supervised=3))


def test_eva_with_init_from_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"init_lora_weights: 'eva' cannot be used: model\.lora\.init_from brings"):
        module("base", init_from=str(tmp_path))
