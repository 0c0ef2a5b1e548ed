"""Callback state in a checkpoint: progress is restored, options are those of this start."""

from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, Timer

import synthetic
from phi3_lightning import Phi3LoRAModule

BATCHES = [synthetic.batch_of([[synthetic.document(9, 5, seed)]]) for seed in range(3)]


class StoresAll(Callback):
    """Stores all its attributes, options too, as many callbacks do."""

    def __init__(self, every: int = 2, names: tuple[str, ...] = ("a",), count: int = 0) -> None:
        self._every = every
        self.names = list(names)
        self.count = count

    def on_train_batch_end(self, *_):
        self.count += 1

    def state_dict(self):
        return {name: vars(self)[name] for name in ("_every", "names", "count")}

    def load_state_dict(self, state_dict):
        vars(self).update(state_dict)


class Derived(StoresAll):
    """Passes its options to its base class."""

    def __init__(self, scale: float, **options) -> None:
        super().__init__(**options)
        self.scale = scale


class AtFitStart(Callback):
    """Records a callback's state in the first hook after loading."""

    def __init__(self, callback: Callback) -> None:
        self.callback = callback

    def on_fit_start(self, trainer, pl_module):
        self.seen = vars(self.callback).copy()


def fit(folder, base, callback, ckpt=None, max_epochs=1, **options):
    module = Phi3LoRAModule(base, dtype="float32", optimizer={"lr": 1e-9})
    watch = AtFitStart(callback)
    trainer = synthetic.trainer(
        folder, callbacks=[callback, watch], max_epochs=max_epochs, num_sanity_val_steps=0, **options
    )
    data = synthetic.loader(BATCHES)
    trainer.fit(module, data, data, ckpt_path=ckpt, weights_only=True)
    trainer.save_checkpoint(folder / "last.ckpt")
    assert torch.load(folder / "last.ckpt", weights_only=True)  # only plain types
    return watch.seen


@pytest.mark.parametrize(
    ("former", "now", "expected"),
    [
        (StoresAll(2), StoresAll(5), {"_every": 5, "count": 3}),
        (StoresAll(5), StoresAll(2), {"_every": 2, "count": 3}),
        (StoresAll(names=("a", "b")), StoresAll(names=("c",)), {"names": ["c"], "count": 3}),
        (StoresAll(), StoresAll(), {"_every": 2, "names": ["a"], "count": 3}),
        (StoresAll(count=4), StoresAll(count=4), {"count": 7}),  # an unchanged initial value takes the stored progress
        (StoresAll(count=4), StoresAll(count=0), {"count": 0}),
        (Derived(0.5, every=3), Derived(0.1, every=4), {"scale": 0.1, "_every": 4, "count": 3}),
        (
            EarlyStopping("val/loss", min_delta=1.0, patience=7),
            EarlyStopping("val/loss", min_delta=2.0, patience=4),
            {"patience": 4, "min_delta": -2.0, "wait_count": 0},
        ),
    ],
)
def test_options_of_this_start_win_and_progress_is_restored(tmp_path, tiny_base, former, now, expected):
    fit(tmp_path, tiny_base, former)
    seen = fit(tmp_path, tiny_base, now, tmp_path / "last.ckpt", max_epochs=2)
    assert {name: seen[name] for name in expected} == expected
    assert "load_state_dict" not in vars(now)


def test_the_option_typed_last_wins(tmp_path, tiny_base):
    for epochs, every in enumerate((2, 5, 2), 1):
        ckpt = tmp_path / "last.ckpt" if epochs > 1 else None
        assert fit(tmp_path, tiny_base, StoresAll(every), ckpt, epochs)["_every"] == every


def test_typed_options_win_over_a_checkpoint_without_options(tmp_path, tiny_base):
    fit(tmp_path, tiny_base, EarlyStopping("val/loss", patience=7))
    old = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del old["callback_options"]
    torch.save(old, tmp_path / "old.ckpt")
    now = EarlyStopping("val/loss", patience=4)
    assert fit(tmp_path, tiny_base, now, tmp_path / "old.ckpt", max_epochs=2)["patience"] == 4


def test_a_larger_patience_continues_the_wait_count(tmp_path, tiny_base):
    first = EarlyStopping("val/loss", min_delta=1.0, patience=1)
    fit(tmp_path, tiny_base, first, max_epochs=20)
    assert first.stopped_epoch == 1
    second = EarlyStopping("val/loss", min_delta=1.0, patience=4)
    fit(tmp_path, tiny_base, second, tmp_path / "last.ckpt", max_epochs=20)
    assert (second.stopped_epoch, second.wait_count) == (4, 4)


def test_another_metric_starts_with_a_wait_count_of_zero(tmp_path, tiny_base):
    fit(tmp_path, tiny_base, EarlyStopping("val/loss", min_delta=1.0, patience=1), max_epochs=20)
    now = EarlyStopping("val/perplexity", patience=3)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint need to be provided"):
        seen = fit(tmp_path, tiny_base, now, tmp_path / "last.ckpt", max_epochs=3)
    assert (seen["wait_count"], seen["patience"]) == (0, 3)


class Slow(Timer):
    """A Timer whose stored time has run out."""

    def state_dict(self):
        return {"time_elapsed": {"train": 1e9}}


@pytest.mark.parametrize("kind", [Timer, Slow])
def test_each_start_has_its_own_time(tmp_path, tiny_base, kind):
    fit(tmp_path, tiny_base, kind(timedelta(hours=1)))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    saved["callbacks"][kind.__name__]["time_elapsed"]["train"] = 1e9
    torch.save(saved, tmp_path / "last.ckpt")
    timer = kind(timedelta(hours=1))
    fit(tmp_path, tiny_base, timer, tmp_path / "last.ckpt", max_epochs=2)
    assert timer.time_elapsed("train") < 3600
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6


def test_each_start_has_the_max_time_of_the_trainer(tmp_path, tiny_base):
    for epochs in (1, 2):
        ckpt = tmp_path / "last.ckpt" if epochs == 2 else None
        fit(tmp_path, tiny_base, StoresAll(), ckpt, epochs, max_time={"hours": 1})
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert saved["global_step"] == 3 * epochs
        saved["callbacks"]["Timer"]["time_elapsed"]["train"] = 3601.0
        torch.save(saved, tmp_path / "last.ckpt")
