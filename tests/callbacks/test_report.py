"""What a run says of itself."""

import re
from pathlib import Path

import pytest

import phi3_lightning
import synthetic
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.callbacks import RunReport

TINY = Path(phi3_lightning.__file__).parent / "assets" / "tiny_phi3"
DATA = [synthetic.batch_of([[synthetic.document(8, 4, seed)]]) for seed in range(4)]


def report(folder, module, capsys, data=None, held_out=DATA, **options) -> str:
    """What is printed, on one line and without the lines of tables."""
    trainer = synthetic.trainer(folder, callbacks=[RunReport(folder)], **options)
    if data is None:
        trainer.fit(module, synthetic.loader(DATA), synthetic.loader(held_out) if held_out else None)
    else:
        trainer.fit(module, data)
    return " ".join(re.sub("[\u2500-\u257f]", " ", capsys.readouterr().out).split())


def small(base, **options) -> Phi3LoRAModule:
    lora = {"r": 4, "target_modules": ["qkv_proj", "down_proj"]}
    return Phi3LoRAModule(base, **{"dtype": "float32", "lora": lora, "optimizer": {"lr": 1e-2}} | options)


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_what_is_trained_is_said_before_the_first_step(tmp_path, tiny_base, capsys):
    module = small(tiny_base)
    said = report(tmp_path, module, capsys)
    assert "qkv_proj 2 of 2" in said
    assert "down_proj 2 of 2" in said
    trained = sum(parameter.numel() for parameter in module.trained_parameters())
    total = sum(parameter.numel() for parameter in module.parameters())
    assert f"trainable {trained:,} of {total:,} parameters" in said


def test_steps_and_warmup_are_counted(tmp_path, tiny_base, capsys):
    module = small(tiny_base, schedule={"warmup": 0.3})
    said = report(tmp_path, module, capsys, accumulate_grad_batches=2, max_epochs=3)
    assert "4 batches an epoch, 2 to an optimiser step; 6 optimiser steps, 2 of them warm-up" in said
    assert "starting at epoch 0, step 0" in said


@pytest.mark.parametrize(("lr", "warned"), [(1e-5, True), (1e-2, False)])
def test_a_run_that_can_move_nothing_is_said(tmp_path, tiny_base, capsys, lr, warned):
    said = report(tmp_path, small(tiny_base, optimizer={"lr": lr}), capsys)
    assert ("the answers will not change" in said) == warned


@pytest.mark.parametrize("sanity", [-1, 0])
def test_first_and_last_held_out_numbers(tmp_path, tiny_base, capsys, sanity):
    module = small(tiny_base)
    (first,) = synthetic.trainer(tmp_path).validate(module, synthetic.loader(DATA), verbose=False)
    said = report(tmp_path, module, capsys, max_epochs=3, num_sanity_val_steps=sanity)
    (last,) = synthetic.trainer(tmp_path).validate(module, synthetic.loader(DATA), verbose=False)
    assert (f"val/loss {first['val/loss']:.4f} {last['val/loss']:.4f}" in said) == (sanity == -1)
    assert f" {last['val/loss']:.4f} val/token_accuracy" in said
    assert first["val/loss"] > last["val/loss"]


def test_a_run_without_validation_reports_none(tmp_path, tiny_base, capsys):
    said = report(tmp_path, small(tiny_base), capsys, held_out=None)
    assert "trainable" in said
    assert "held-out" not in said


def test_where_things_are_is_said(tmp_path, tiny_base, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"0" * 2_500_000)
    (tmp_path / "tensorboard").mkdir()
    said = report(tmp_path, small(tiny_base), capsys)
    assert "last.ckpt (2.5 MB)" in said
    assert f"tensorboard --logdir {tmp_path / 'tensorboard'}" in said


def test_base_and_tuned_answers_stand_side_by_side(tmp_path, capsys):
    data = ChatDataModule(
        train=str(TINY / "chats_val.jsonl"),
        val_fraction=0.1,
        predict=str(TINY / "prompts.jsonl"),
        tokenizer=str(TINY),
        max_length=256,
        num_workers=0,
        cache_dir=str(tmp_path / "cache"),
    )
    module = Phi3LoRAModule(str(TINY), generation={"max_new_tokens": 8})
    said = report(tmp_path, module, capsys, data=data, max_steps=2, max_epochs=-1)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    row, answer = batch["row_ids"].index(0), module.predict_step(batch, 0)
    tuned = data.tokenizer.decode(answer[row], skip_special_tokens=True)
    prompt = data.tokenizer.decode(
        batch["input_ids"][row][batch["attention_mask"][row].bool()], skip_special_tokens=True
    )
    assert "prompt base tuned" in said
    assert " ".join(tuned.split()) in said
    assert prompt.split()[0] in said.split("tuned")[-1]
    assert module.model.training
