"""Progress as plain lines, without a terminal."""

import logging

import pytest

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.callbacks import LineProgress

DATA = [synthetic.batch_of([[synthetic.document(8, 4, seed)]]) for seed in range(3)]


def lines(folder, base, caplog, progress: LineProgress, **options) -> list[str]:
    caplog.clear()
    trainer = synthetic.trainer(folder, callbacks=[progress], enable_progress_bar=True, **options)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        trainer.fit(Phi3LoRAModule(base, dtype="float32"), synthetic.loader(DATA), synthetic.loader(DATA))
    return [message for message in caplog.messages if message.startswith(("epoch ", "step "))]


@pytest.fixture(autouse=True)
def _lightning_speaks(monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("lightning"), "propagate", True)


def test_each_line_has_step_and_loss(tmp_path, tiny_base, caplog):
    shown = lines(tmp_path, tiny_base, caplog, LineProgress(every_n_seconds=0))
    assert [line.split(":")[0] for line in shown] == [
        "epoch 0, batch 1/3, step 1",
        "epoch 0, batch 2/3, step 2",
        "epoch 0, batch 3/3, step 3",
        "step 3, validated",
    ]
    assert all("train/loss 4." in line for line in shown[:3])
    assert "val/loss 4." in shown[3]


def test_lines_are_rare_but_the_last_batch_always_has_one(tmp_path, tiny_base, caplog):
    shown = lines(tmp_path, tiny_base, caplog, LineProgress(every_n_seconds=1e6), max_epochs=2)
    assert [line.split(":")[0] for line in shown if "batch" in line][-2:] == [
        "epoch 0, batch 3/3, step 3",
        "epoch 1, batch 3/3, step 6",
    ]
    assert len(shown) <= 5


def test_a_disabled_callback_prints_nothing(tmp_path, tiny_base, caplog):
    progress = LineProgress(every_n_seconds=0)
    progress.disable()
    assert lines(tmp_path, tiny_base, caplog, progress) == []
