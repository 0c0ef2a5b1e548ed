"""Tokens per second, by a clock that the test moves."""

import lightning.pytorch as pl
import pytest
import torch

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.batch import IGNORE_INDEX
from phi3_lightning.callbacks import Throughput
from phi3_lightning.model.flops import step_flops


class Clock:
    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("phi3_lightning.callbacks.throughput.time.perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


class Slow(pl.LightningModule):
    """Takes two seconds for a batch, and an hour for a validation."""

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


class RecordSpeeds(pl.Callback):
    """Records the logged speeds, step by step."""

    def __init__(self) -> None:
        self.speeds: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step > len(self.speeds):
            metrics = trainer.callback_metrics
            names = ("speed/tokens_per_second", "speed/supervised_tokens_per_second")
            self.speeds.append(tuple(round(metrics[name].item(), 3) for name in names))


MASKED = ([5] * 6, [IGNORE_INDEX] * 6)
BATCHES = [
    synthetic.batch_of([[synthetic.document(10, 4, 0)], [synthetic.document(30, 8, 1)]]),  # 20 positions are padding
    synthetic.batch_of([[synthetic.document(20, 2, 2), synthetic.document(4, 2, 3)]]),
    synthetic.batch_of([[MASKED]]),
]


def speeds(folder, clock, **options) -> list[tuple[float, float]]:
    keep = RecordSpeeds()
    trainer = synthetic.trainer(folder, callbacks=[Throughput(), keep], **options)
    trainer.fit(Slow(clock), synthetic.loader(BATCHES), synthetic.loader(BATCHES[:1]))
    return keep.speeds


def test_padding_tokens_are_not_counted(tmp_path, clock):
    assert speeds(tmp_path, clock) == [(20, 6), (12, 2), (3, 0)]


def test_a_step_covers_its_accumulation_window(tmp_path, clock):
    assert speeds(tmp_path, clock, accumulate_grad_batches=2) == [(16, 4), (3, 0)]


@pytest.mark.parametrize("options", [{"val_check_interval": 1}, {"max_epochs": 2}])
def test_validation_time_is_excluded(tmp_path, clock, options):
    assert speeds(tmp_path, clock, **options)[:3] == [(20, 6), (12, 2), (3, 0)]
    assert len(set(speeds(tmp_path, clock, **options))) == 3


class RecordAll(pl.Callback):
    """Records everything under speed/, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step > len(self.steps):
            metrics = trainer.callback_metrics
            self.steps.append({name: metrics[name].item() for name in metrics if name.startswith("speed/")})


def recorded(folder, module, batches, row_length=None, **options) -> list[dict[str, float]]:
    record = RecordAll()
    trainer = synthetic.trainer(folder, callbacks=[Throughput(row_length), record], **options)
    trainer.fit(module, synthetic.loader(batches))
    return record.steps


def test_padding_fraction_and_packing_efficiency(tmp_path, clock):
    first, second, third = recorded(tmp_path, Slow(clock), BATCHES, row_length=40)
    assert first["speed/padding_fraction"] == pytest.approx(20 / 60)
    assert first["speed/packing_efficiency"] == pytest.approx(40 / 80)
    assert (second["speed/padding_fraction"], second["speed/packing_efficiency"]) == pytest.approx((0, 24 / 40))
    assert third["speed/padding_fraction"] == 0
    (window, _) = recorded(tmp_path, Slow(clock), BATCHES, row_length=40, accumulate_grad_batches=2)
    assert (window["speed/padding_fraction"], window["speed/packing_efficiency"]) == pytest.approx((20 / 84, 64 / 120))


def test_a_packed_row_of_pairs_holds_twice_as_many_tokens(tmp_path, clock):
    pairs = BATCHES[1] | {"shared_lengths": [[0, 2]]}
    (step,) = recorded(tmp_path, Slow(clock), [pairs], row_length=20)
    assert step["speed/packing_efficiency"] == pytest.approx(24 / 40)


def test_unpacked_rows_have_no_packing_efficiency(tmp_path, clock):
    assert "speed/packing_efficiency" not in recorded(tmp_path, Slow(clock), BATCHES)[0]


def test_a_foreign_module_has_no_mfu(tmp_path, clock):
    assert "speed/mfu" not in recorded(tmp_path, Slow(clock), BATCHES)[0]


def test_mfu_follows_from_flops_speed_and_peak(tmp_path, tiny_base, monkeypatch):
    monkeypatch.setattr("phi3_lightning.callbacks.throughput.peak_flops", lambda *_: 1e9)
    module = Phi3LoRAModule(tiny_base, dtype="float32")
    for step in recorded(tmp_path, module, BATCHES[:2]):
        flops = step_flops(module.loaded_model)
        needed = flops.per_token * step["speed/tokens_per_second"]
        needed += flops.per_supervised_token * step["speed/supervised_tokens_per_second"]
        assert step["speed/mfu"] == pytest.approx(needed / 1e9, rel=1e-5)


def test_shared_prompts_and_the_pass_of_a_reference_count_as_they_are_computed(tmp_path, tiny_base, monkeypatch):
    monkeypatch.setattr("phi3_lightning.callbacks.throughput.peak_flops", lambda *_: 1e9)
    module = Phi3LoRAModule(tiny_base, dtype="float32", objective={"name": "dpo"})
    batch = synthetic.pairs_of([[synthetic.pair(20, 3, 5, 0)]])
    (step,) = recorded(tmp_path, module, [batch])
    plain = step_flops(module.loaded_model)
    weights = sum(p.numel() for name, p in module.named_parameters() if "norm" not in name and "embed" not in name)
    head = module.head.weight.numel()
    computed = (23 + 25 - 19) / (23 + 25) * step["speed/tokens_per_second"]
    needed = (plain.per_token + 2 * (weights - head)) * computed
    needed += (plain.per_supervised_token + 2 * head) * step["speed/supervised_tokens_per_second"]
    assert step["speed/mfu"] == pytest.approx(needed / 1e9, rel=1e-5)
