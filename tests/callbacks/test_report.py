"""The report that a run prints about itself."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.callbacks import RunReport

DATA = [synthetic.batch_of([[synthetic.document(8, 4, seed)]]) for seed in range(4)]


def report(folder, module, capsys, held_out=DATA, **options) -> str:
    """The printed text on one line, without table borders."""
    trainer = synthetic.trainer(folder, callbacks=[RunReport(folder)], **options)
    trainer.fit(module, synthetic.loader(DATA), synthetic.loader(held_out) if held_out else None)
    return " ".join(re.sub("[\u2500-\u257f]", " ", capsys.readouterr().out).split())


def small(base, **options) -> Phi3LoRAModule:
    lora = {"r": 4, "target_modules": ["qkv_proj", "down_proj"]}
    return Phi3LoRAModule(base, **{"dtype": "float32", "lora": lora, "optimizer": {"lr": 1e-2}} | options)


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_adapted_layers_and_trainable_parameters_are_reported_first(tmp_path, tiny_base, capsys):
    module = small(tiny_base)
    text = report(tmp_path, module, capsys)
    assert "qkv_proj 2 of 2" in text
    assert "down_proj 2 of 2" in text
    trained = sum(parameter.numel() for parameter in module.trained_parameters())
    total = sum(parameter.numel() for parameter in module.parameters())
    assert f"trainable {trained:,} of {total:,} parameters" in text


def test_steps_and_warmup_are_counted(tmp_path, tiny_base, capsys):
    module = small(tiny_base, schedule={"warmup": 0.3})
    text = report(tmp_path, module, capsys, accumulate_grad_batches=2, max_epochs=3)
    assert "4 batches an epoch, 2 to an optimiser step; 6 optimiser steps, 2 of them warm-up" in text
    assert "starting at epoch 0, step 0" in text


@pytest.mark.parametrize(("lr", "warned"), [(1e-5, True), (1e-2, False)])
def test_a_run_too_weak_to_change_answers_is_warned_about(tmp_path, tiny_base, capsys, lr, warned):
    warning = pytest.warns(UserWarning, match="the answers will not change") if warned else nullcontext()
    with warning:
        report(tmp_path, small(tiny_base, optimizer={"lr": lr}), capsys)


@pytest.mark.parametrize("sanity", [-1, 0])
def test_held_out_numbers_are_reported_before_and_after(tmp_path, tiny_base, capsys, sanity):
    module = small(tiny_base)
    (first,) = synthetic.trainer(tmp_path).validate(module, synthetic.loader(DATA), verbose=False)
    text = report(tmp_path, module, capsys, max_epochs=3, num_sanity_val_steps=sanity)
    (last,) = synthetic.trainer(tmp_path).validate(module, synthetic.loader(DATA), verbose=False)
    assert (f"val/loss {first['val/loss']:.4f} {last['val/loss']:.4f}" in text) == (sanity == -1)
    assert ("before after" in text) == (sanity == -1)
    assert f" {last['val/loss']:.4f} val/token_accuracy" in text
    assert first["val/loss"] > last["val/loss"]


def test_a_score_that_was_not_measured_before_has_no_number_there(tmp_path, tiny_base, capsys):
    class Answers(pl.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                pl_module.log("val/chrf", 12.5)

    trainer = synthetic.trainer(tmp_path, callbacks=[Answers(), RunReport(tmp_path)], num_sanity_val_steps=-1)
    trainer.fit(small(tiny_base), synthetic.loader(DATA), synthetic.loader(DATA))
    [line] = [line for line in capsys.readouterr().out.splitlines() if "val/chrf" in line]
    assert re.findall(r"[\d.]+", line) == ["12.5000"]


def test_a_run_without_validation_reports_none(tmp_path, tiny_base, capsys):
    text = report(tmp_path, small(tiny_base), capsys, held_out=None)
    assert "trainable" in text
    assert "held-out" not in text


def test_checkpoints_and_the_tensorboard_command_are_reported(tmp_path, tiny_base, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"0" * 2_500_000)
    (tmp_path / "tensorboard").mkdir()
    text = report(tmp_path, small(tiny_base), capsys)
    assert "last.ckpt (2.5 MB)" in text
    assert f"tensorboard --logdir {tmp_path / 'tensorboard'}" in text


@pytest.mark.parametrize(
    ("reason", "has_checkpoint", "words"),
    [
        (KeyboardInterrupt(), True, "stopped at step 7; the same command resumes from"),
        (KeyboardInterrupt(), False, "stopped at step 7, before the first checkpoint"),
        (SIGTERMException(), False, "stopped at step 7; the same command resumes there"),
        (ValueError(), True, ""),
    ],
)
def test_an_interrupted_fit_says_how_it_goes_on(tmp_path, capsys, reason, has_checkpoint, words):
    (tmp_path / "checkpoints").mkdir()
    if has_checkpoint:
        (tmp_path / "checkpoints/last.ckpt").touch()
    trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), global_step=7)
    RunReport(tmp_path).on_exception(trainer, None, reason)
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(words)
    assert bool(text) == bool(words)
