"""Tokens a second, by a clock that the test moves."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

import synthetic
from phi3_lightning.batch import IGNORE_INDEX
from phi3_lightning.callbacks import Throughput
from phi3_lightning.callbacks.throughput import peak_memory


class Clock:
    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("phi3_lightning.callbacks.throughput.time.perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


class Slow(pl.LightningModule):
    """Takes two seconds a batch, and an hour a validation."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.speeds: list[dict[str, float]] = []

    def training_step(self, batch, batch_idx):
        self.clock.now += 2
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.clock.now += 3600

    def on_train_batch_start(self, batch, batch_idx):
        self.trainer.callback_metrics.pop("speed/tokens_per_second", None)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Keep(pl.Callback):
    """What is logged, step by step."""

    def __init__(self) -> None:
        self.speeds: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step > len(self.speeds):
            metrics = trainer.callback_metrics
            names = ("speed/tokens_per_second", "speed/supervised_tokens_per_second")
            self.speeds.append(tuple(round(metrics[name].item(), 3) for name in names))


MASKED = ([5] * 6, [IGNORE_INDEX] * 6)
BATCHES = [
    synthetic.batch_of([[synthetic.document(10, 4, 0)], [synthetic.document(30, 8, 1)]]),  # 20 places are padding
    synthetic.batch_of([[synthetic.document(20, 2, 2), synthetic.document(4, 2, 3)]]),
    synthetic.batch_of([[MASKED]]),
]


def speeds(folder, clock, **options) -> list[tuple[float, float]]:
    keep = Keep()
    trainer = synthetic.trainer(folder, callbacks=[Throughput(), keep], **options)
    trainer.fit(Slow(clock), synthetic.loader(BATCHES), synthetic.loader(BATCHES[:1]))
    return keep.speeds


def test_documents_count_and_padding_does_not(tmp_path, clock):
    assert speeds(tmp_path, clock) == [(20, 6), (12, 2), (3, 0)]


def test_a_step_is_a_whole_window(tmp_path, clock):
    assert speeds(tmp_path, clock, accumulate_grad_batches=2) == [(16, 4), (3, 0)]


@pytest.mark.parametrize("options", [{"val_check_interval": 1}, {"max_epochs": 2}])
def test_validation_takes_no_time(tmp_path, clock, options):
    assert speeds(tmp_path, clock, **options)[:3] == [(20, 6), (12, 2), (3, 0)]
    assert len(set(speeds(tmp_path, clock, **options))) == 3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells the peak there")
def test_peak_memory_is_that_of_the_process():
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    # both count pages, the one by thread and added up now and then
    assert peak_memory(torch.device("cpu")) == pytest.approx(peak, rel=0.02)
