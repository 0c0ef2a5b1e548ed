"""After any sequence of fit, validate, predict, save and load, every frozen tensor is bit-identical."""

import hashlib

import lightning.pytorch as pl
import loralib
import pytest
import torch
from transformers import Phi3ForCausalLM

import synthetic
from phi3_lightning import Phi3LoRAModule


def frozen_hashes(module: Phi3LoRAModule) -> dict[str, str]:
    return {
        name: hashlib.sha256(parameter.detach().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, parameter in module.named_parameters()
        if not parameter.requires_grad
    }


@pytest.mark.parametrize("backend", ["peft", "loralib"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("tied", [False, True])
def test_no_frozen_bit_changes(tmp_path, precision, tied, backend):
    base = synthetic.save_tiny(tmp_path / "base", tie_word_embeddings=tied)
    batches = [synthetic.batch_of([[synthetic.document(12, 6, seed)]], seed) for seed in range(4)]
    data = synthetic.loader(batches)
    module = Phi3LoRAModule(
        base, lora={"backend": backend, "lora_dropout": 0.1}, optimizer={"lr": 1e-2, "weight_decay": 0.1}
    )
    module.configure_model()
    before = frozen_hashes(module)
    adapter = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    def trainer(**options) -> pl.Trainer:
        return pl.Trainer(
            accelerator="cpu", precision=precision, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path, **options,
        )  # fmt: skip

    first = trainer(max_epochs=2, gradient_clip_val=1.0)
    first.fit(module, data, data)
    first.save_checkpoint(tmp_path / "a.ckpt")
    prompts = {
        "input_ids": torch.randint(3, 90, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.int64),
        "document_ids": [0, 1], "stop_ids": [2],
    }  # fmt: skip
    for _ in range(3):
        trainer().validate(module, data, verbose=False)
    trainer().predict(module, synthetic.loader([prompts]))
    trainer(max_epochs=3).fit(module, data, data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)

    assert frozen_hashes(module) == before
    reloaded = Phi3LoRAModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert frozen_hashes(reloaded) == before
    moved = [name for name, p in module.named_parameters() if p.requires_grad and not torch.equal(p, adapter[name])]
    assert len(moved) == len(adapter)  # the run did train


def plain_loralib(base: str) -> Phi3ForCausalLM:
    """As the cookbook has it, with loralib's own default: weights are merged in place for evaluation."""
    model = Phi3ForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for path, old in list(model.named_modules()):
        if path.endswith("o_proj"):
            new = loralib.Linear(old.in_features, old.out_features, r=4, bias=False).bfloat16()
            new.weight.data = old.weight.data
            torch.nn.init.normal_(new.lora_B, std=0.05)
            model.set_submodule(path, new)
    return model


@pytest.mark.parametrize("backend", ["peft", "loralib", "plain loralib"])
def test_fifty_validations_in_bfloat16_change_no_bit(tmp_path, backend):
    base = synthetic.save_tiny(tmp_path / "base", torch.bfloat16)
    batch = synthetic.batch_of([[synthetic.document(12, 6, 0)]])
    if backend == "plain loralib":  # the control
        model = plain_loralib(base)
        before = model.model.layers[0].self_attn.o_proj.weight.detach().clone()
        for _ in range(50):
            model.eval()
            model.train()
        assert not torch.equal(model.model.layers[0].self_attn.o_proj.weight, before)
        return
    module = synthetic.randomised(Phi3LoRAModule(base, lora={"backend": backend}))
    before = frozen_hashes(module)
    trainer = synthetic.trainer(tmp_path, precision="bf16-mixed", max_epochs=50, num_sanity_val_steps=0)
    trainer.fit(module, synthetic.loader([batch]), synthetic.loader([batch]))
    assert trainer.global_step == 50
    assert frozen_hashes(module) == before
