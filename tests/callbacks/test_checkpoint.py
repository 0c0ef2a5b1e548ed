"""The two checkpoints of a run: when they are written, and what is restored on resuming."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import synthetic
from phi3_lightning.accumulation import TokenWeightedModule
from phi3_lightning.callbacks import RunCheckpoint
from phi3_lightning.checkpoint.io import SafeCheckpointIO
from phi3_lightning.errors import CheckpointError, ConfigError

EPOCH = 5
NAN = float("nan")


class Scripted(TokenWeightedModule):
    """Has the given validation losses, one after the other."""

    def __init__(self, *losses: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.losses = list(losses)

    def training_step(self, batch, batch_idx):
        return self.weighted_mean((self.weight - 1).square().sum(), 1, [batch_idx])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.losses[0])

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.losses.pop(0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class RecordingIO(SafeCheckpointIO):
    """Records which file was written at which step."""

    def __init__(self) -> None:
        self.done: list[tuple[str, int]] = []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.done.append((Path(path).name, checkpoint["global_step"]))
        super().save_checkpoint(checkpoint, path, storage_options)


class RunsInFolder:
    """Runs with a RunCheckpoint in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plugins: list[SafeCheckpointIO] | None = None

    def __call__(self, module, resume: str | None = None, callbacks=(), checkpoint=None, **options) -> Any:
        writes = RecordingIO()
        self.checkpoint = RunCheckpoint(str(self.folder / "kept"), **checkpoint or {})
        trainer = synthetic.trainer(
            self.folder,
            enable_checkpointing=True,
            callbacks=[self.checkpoint, *callbacks],
            plugins=[writes] if self.plugins is None else self.plugins,
            **{"num_sanity_val_steps": 0} | options,
        )
        data, held_out = (torch.utils.data.DataLoader(range(EPOCH), batch_size=1) for _ in range(2))
        path = None if resume is None else self.folder / "kept" / resume
        try:
            trainer.fit(module, data, held_out if module.losses else None, ckpt_path=path, weights_only=True)
        finally:
            self.written = writes.done
        return self.written

    def step_of(self, name: str) -> int:
        return torch.load(self.folder / "kept" / name, weights_only=True)["global_step"]


@pytest.fixture
def fit(tmp_path) -> RunsInFolder:
    return RunsInFolder(tmp_path)


def test_the_last_and_the_best_checkpoint_are_kept(fit):
    fit(Scripted(3.0, 1.0, 2.0), max_epochs=3)
    assert (fit.step_of("last.ckpt"), fit.step_of("best.ckpt")) == (15, 10)
    files = list((fit.folder / "kept").iterdir())
    assert sorted(file.name for file in files) == ["best.ckpt", "last.ckpt"]
    assert not any(file.is_symlink() for file in files)


@pytest.mark.parametrize("losses", [(2.0, NAN), (NAN, 2.0), (NAN, NAN), (2.0, math.inf), (2.0, 2.0)])
def test_best_is_replaced_only_by_a_lower_loss(fit, losses):
    written = fit(Scripted(*losses), max_epochs=2)
    expected = [] if 2.0 not in losses else [("best.ckpt", EPOCH * (1 + losses.index(2.0)))]
    assert [entry for entry in written if entry[0] == "best.ckpt"] == expected
    assert fit.step_of("last.ckpt") == 2 * EPOCH


def test_the_sanity_check_sets_no_best_checkpoint(fit):
    fit(Scripted(9.0), num_sanity_val_steps=2)
    assert fit.step_of("best.ckpt") == EPOCH


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every_n_steps": 2}, [2, 4, 5]),
        ({"every_n_steps": 3}, [3, 5]),
        ({"every_n_minutes": 0}, [1, 2, 3, 4, 5]),
        ({}, [5]),
    ],
)
def test_last_is_written_at_the_configured_steps(fit, options, steps):
    assert fit(Scripted(), checkpoint=options) == [("last.ckpt", step) for step in steps]


def test_every_n_minutes_spaces_writes_by_time(fit, monkeypatch):
    clock = iter(range(0, 10_000, 40))  # seconds: each reading of the clock is 40 later
    monkeypatch.setattr("phi3_lightning.callbacks.checkpoint.time.monotonic", lambda: next(clock))
    assert fit(Scripted(), checkpoint={"every_n_minutes": 1.0}) == [
        ("last.ckpt", 2),
        ("last.ckpt", 4),
        ("last.ckpt", 5),
    ]


def test_accumulation_writes_once_a_step(fit):
    written = fit(Scripted(), checkpoint={"every_n_steps": 1}, accumulate_grad_batches=2)
    assert written == [("last.ckpt", 1), ("last.ckpt", 2), ("last.ckpt", 3)]


def test_last_is_written_where_training_ends_within_an_epoch(fit):
    fit(Scripted(), max_steps=7, max_epochs=-1)
    assert fit.step_of("last.ckpt") == 7


def test_the_best_value_survives_a_restart(fit):
    fit(Scripted(1.0), max_epochs=1)
    fit(Scripted(2.0, 0.5), max_epochs=3, resume="last.ckpt")
    assert [entry for entry in fit.written if entry[0] == "best.ckpt"] == [("best.ckpt", 15)]
    assert fit.checkpoint.best_score == 0.5


@pytest.mark.parametrize(
    ("monitor", "best"),
    [
        ("val/loss", 0.4),
        ("val/preference_accuracy", 0.9),
        ("val/ranking_accuracy", 0.9),
        ("val/reward_margin", 0.9),
        ("val/chosen_logp", 0.9),
        ("val/rejected_logp", 0.4),
        ("val/rougeL", 0.9),
        ("val/chrf", 0.9),
        ("val/exact_match", 0.9),
        ("val/stop_rate", 0.9),
    ],
)
def test_without_a_mode_the_best_value_follows_from_the_metric(fit, monitor, best):
    class Preferences(Scripted):
        def log(self, name, value, **options):
            super().log(monitor if name == "val/loss" else name, value, **options)

    fit(Preferences(0.5, 0.9, math.nan, 0.4), max_epochs=4, checkpoint={"monitor": monitor})
    assert fit.checkpoint.best_score == pytest.approx(best)


def test_another_monitor_starts_a_new_best(fit):
    fit(Scripted(1.0), max_epochs=1)
    fit(Scripted(), max_epochs=2, resume="last.ckpt", checkpoint={"monitor": None})
    assert fit.checkpoint.best_score == math.inf


def test_a_moved_folder_resumes(fit, tmp_path):
    fit(Scripted(1.0), max_epochs=1)
    (tmp_path / "kept").rename(tmp_path / "moved")
    moved = RunsInFolder(tmp_path / "new")
    (tmp_path / "new").mkdir()
    (tmp_path / "moved").rename(tmp_path / "new" / "kept")
    moved(Scripted(2.0), max_epochs=2, resume="last.ckpt")
    assert (moved.step_of("last.ckpt"), moved.step_of("best.ckpt")) == (10, 5)
    assert not (tmp_path / "kept").exists()


def test_a_checkpoint_remembers_no_path(fit):
    fit(Scripted(1.0))
    text = repr(torch.load(fit.folder / "kept" / "last.ckpt", weights_only=True)["callbacks"])
    assert str(fit.folder) not in text
    assert "best_score" in text


def test_without_validation_only_last_is_written(fit):
    assert fit(Scripted()) == [("last.ckpt", 5)]


def test_without_a_monitor_only_last_is_written(fit):
    assert fit(Scripted(1.0), checkpoint={"monitor": None}) == [("last.ckpt", 5)]


def test_a_monitor_that_is_not_logged_is_named(fit):
    with pytest.warns(
        UserWarning, match=r"checkpoint\.monitor: val/los is not logged .*val/loss.*no best\.ckpt"
    ) as warned:
        fit(Scripted(1.0, 0.5), checkpoint={"monitor": "val/los"}, max_epochs=2)
    assert sum("checkpoint.monitor" in str(warning.message) for warning in warned) == 1
    assert fit.written == [("last.ckpt", 5), ("last.ckpt", 10)]


def test_fast_dev_run_writes_nothing(fit):
    assert fit(Scripted(1.0), fast_dev_run=2) == []
    assert not (fit.folder / "kept").exists()


class CallAtBatch(pl.Callback):
    """Calls a function at a batch."""

    def __init__(self, batch: int, what) -> None:
        self.batch, self.what = batch, what

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            self.what()


def test_sigterm_saves_a_checkpoint_before_stopping(fit):
    at = CallAtBatch(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        fit(Scripted(1.0), callbacks=[at])
    assert fit.written[-1][0] == "last.ckpt"
    assert fit.step_of("last.ckpt") in (3, 4)


def test_any_other_exception_saves_nothing(fit):
    def fail() -> None:
        raise ValueError("in the middle of a step")

    with pytest.raises(ValueError, match="in the middle"):
        fit(Scripted(1.0), callbacks=[CallAtBatch(3, fail)], checkpoint={"every_n_steps": 2})
    assert fit.written == [("last.ckpt", 2)]


@pytest.mark.parametrize("wrong", [{"every_n_steps": 0}, {"every_n_minutes": -1}])
def test_ranges_are_checked(wrong):
    with pytest.raises(ConfigError, match=f"checkpoint.{next(iter(wrong))}"):
        RunCheckpoint(**wrong)


def test_the_folder_defaults_to_that_of_the_trainer(tmp_path):
    checkpoint = RunCheckpoint()
    with pytest.raises(ValueError, match="not known"):
        _ = checkpoint.last_path
    checkpoint.setup(synthetic.trainer(tmp_path), Scripted(), "fit")
    assert checkpoint.last_path == tmp_path / "checkpoints" / "last.ckpt"
    assert checkpoint.best_path == tmp_path / "checkpoints" / "best.ckpt"


def evaluate(folder: Path, word: str | None, module: Scripted, **options) -> float:
    """The weight that a script evaluates with one of Lightning's words as its ckpt_path."""
    trainer = synthetic.trainer(
        folder, enable_checkpointing=True, callbacks=[RunCheckpoint(str(folder / "kept"))], plugins=[SafeCheckpointIO()]
    )
    trainer.validate(module, torch.utils.data.DataLoader(range(2)), ckpt_path=word, verbose=False, **options)
    return module.weight.item()


@pytest.mark.parametrize("word", ["last", "best"])
def test_a_script_evaluates_last_and_best_by_lightnings_words(fit, word):
    fit(Scripted(3.0, 1.0, 2.0), max_epochs=3)
    trained = torch.load(fit.folder / "kept" / f"{word}.ckpt", weights_only=True)["state_dict"]["weight"].item()
    assert evaluate(fit.folder, word, Scripted(0.0), weights_only=True) == trained != 0


def test_ckpt_path_last_resumes_a_script_or_starts_it(fit):
    checkpoint = RunCheckpoint(str(fit.folder / "kept"))
    data = torch.utils.data.DataLoader(range(EPOCH), batch_size=1)
    for epochs in (1, 2):
        trainer = synthetic.trainer(
            fit.folder, enable_checkpointing=True, callbacks=[checkpoint], plugins=[SafeCheckpointIO()],
            max_epochs=epochs,
        )  # fmt: skip
        if epochs == 1:
            with pytest.warns(UserWarning, match="there is no last checkpoint available"):
                trainer.fit(Scripted(), data, ckpt_path="last")
        else:
            trainer.fit(Scripted(), data, ckpt_path="last", weights_only=True)
        assert trainer.global_step == EPOCH * epochs
        assert trainer.num_training_batches == EPOCH
    assert checkpoint.last_model_path == str(fit.folder / "kept" / "last.ckpt")


@pytest.mark.parametrize(("word", "kind"), [("last", CheckpointError), ("best", ValueError)])
def test_a_missing_checkpoint_is_an_error_and_never_the_weights_in_memory(tmp_path, word, kind):
    with pytest.raises(kind, match=rf'ckpt_path="{word}"'):
        evaluate(tmp_path, word, Scripted(0.0))


def test_the_paths_and_score_of_model_checkpoint_are_available(fit):
    fit(Scripted(3.0, 1.0, 2.0), max_epochs=3)
    best, last = (str(fit.folder / "kept" / name) for name in ("best.ckpt", "last.ckpt"))
    saved = fit.checkpoint
    assert (saved.best_model_path, saved.last_model_path, saved.best_model_score.item()) == (best, last, 1.0)
    again = RunCheckpoint(str(fit.folder / "kept"))
    assert (again.best_model_path, again.last_model_path) == (best, last)
    assert RunCheckpoint(str(fit.folder / "none")).best_model_path == ""


def test_every_hook_of_model_checkpoint_is_overridden(fit):
    hooks = {name for name in vars(ModelCheckpoint) if name in vars(pl.Callback)}
    assert {"on_train_batch_end", "on_validation_end", "on_exception"} <= hooks
    assert hooks <= vars(RunCheckpoint).keys()


def test_the_state_has_the_key_of_earlier_releases_and_the_mode(fit):
    fit(Scripted(1.0), checkpoint={"every_n_steps": 2})
    states = torch.load(fit.folder / "kept" / "last.ckpt", weights_only=True)["callbacks"]
    assert states["RunCheckpoint"] == {"monitor": "val/loss", "mode": "min", "best_score": 1.0}


@pytest.mark.parametrize("former", [{"monitor": "val/chrf"}, {"monitor": "val/chrf", "mode": "max"}])
def test_a_state_of_an_earlier_release_has_the_mode_of_its_metric(former):
    checkpoint = RunCheckpoint(monitor="val/chrf", mode="max")
    checkpoint.load_state_dict(former | {"best_score": 30.0})
    assert checkpoint.best_score == 30.0


def test_a_changed_mode_starts_a_new_best(fit):
    fit(Scripted(1.0), max_epochs=1)
    fit(Scripted(0.5), max_epochs=2, resume="last.ckpt", checkpoint={"mode": "max"})
    assert fit.checkpoint.best_score == 0.5  # lower than the former best, which was the lowest
    assert fit.step_of("best.ckpt") == 2 * EPOCH
    fit(Scripted(0.4), max_epochs=3, resume="last.ckpt", checkpoint={"mode": "max"})
    assert (fit.checkpoint.best_score, fit.step_of("best.ckpt")) == (0.5, 2 * EPOCH)


@pytest.mark.parametrize(("mode", "best"), [("min", 0.4), ("max", 0.9), (None, 0.4)])
def test_a_given_mode_decides_for_any_metric(fit, mode, best):
    fit(Scripted(0.5, 0.9, 0.4), max_epochs=3, checkpoint={"mode": mode})
    assert fit.checkpoint.best_score == pytest.approx(best)


def test_another_mode_is_refused(fit):
    with pytest.raises(ConfigError, match=r"checkpoint.mode: 'auto' cannot be used: choose min or max"):
        RunCheckpoint(mode="auto")
