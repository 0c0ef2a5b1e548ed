"""Lightning's own callbacks and loggers with both classes, as in other people's projects; each works or is refused."""

import warnings
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger

import phi3_lightning
import synthetic
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.errors import ConfigError

TINY = str(Path(phi3_lightning.__file__).parent / "assets/tiny_phi3")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A folder for prepared data, with a smaller model for the vocabulary of the embedded one."""
    folder = tmp_path_factory.mktemp("cache")
    synthetic.save_tiny(folder / "base", vocab_size=1024)
    return folder


def fit(folder: Path, cache: Path, *callbacks, ckpt=None, **options) -> pl.Trainer:
    base, constant = str(cache / "base"), {"name": "constant", "warmup": 0}
    module = Phi3LoRAModule(base, dtype="float32", lora={"r": 4}, schedule=constant)
    options_of_data = {"val_fraction": 0.1, "max_length": 64, "num_workers": 0, "batch_size": 2, "packing": False}
    data = ChatDataModule(train=f"{TINY}/chats_val.jsonl", tokenizer=TINY, cache_dir=str(cache), **options_of_data)
    options = {"limit_train_batches": 4, "limit_val_batches": 1, "num_sanity_val_steps": 0, "max_epochs": 2} | options
    trainer = synthetic.trainer(folder, callbacks=list(callbacks), log_every_n_steps=1, **options)
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    return trainer


def columns(folder: Path) -> set[str]:
    (path,) = folder.rglob("metrics.csv")
    return set(path.read_text().splitlines()[0].split(","))


def test_monitors_log_for_every_group_and_device(tmp_path, cache):
    fit(tmp_path, cache, LearningRateMonitor(), DeviceStatsMonitor(cpu_stats=True), logger=CSVLogger(tmp_path))
    names = columns(tmp_path)
    assert {"lr-AdamW/lora_A", "lr-AdamW/lora_B", "train/loss", "val/loss"} <= names
    assert any(name.startswith("DeviceStatsMonitor.on_train_batch_start/cpu_percent") for name in names)


def test_the_finder_sets_the_rate_that_the_run_takes(tmp_path, cache):
    finder = LearningRateFinder(min_lr=1e-5, max_lr=1e-1, num_training_steps=18, early_stop_threshold=None)
    trainer = fit(tmp_path, cache, finder, limit_val_batches=0, max_epochs=3, limit_train_batches=8)
    suggestion = finder.optimal_lr.suggestion()
    assert suggestion is not None
    assert trainer.lightning_module.learning_rate == suggestion == trainer.optimizers[0].param_groups[0]["lr"]
    assert trainer.global_step == 24  # the trial is no part of the run


def test_the_batch_size_that_is_tried_is_the_one_that_is_used(tmp_path, cache):
    finder = BatchSizeFinder(mode="power", steps_per_trial=1, init_val=3, max_trials=2)
    rows = []
    log = LambdaCallback(on_train_batch_start=lambda *args: rows.append(len(args[2]["input_ids"])))
    trainer = fit(tmp_path, cache, finder, log, limit_val_batches=0, max_epochs=1)
    assert trainer.datamodule.hparams["batch_size"] == finder.optimal_batch_size == 6
    assert max(rows[-trainer.num_training_batches :]) == 6  # one batch of the epoch may be short


def test_a_summary_counts_the_adapter_as_trainable(tmp_path, cache, capsys):
    trainer = fit(tmp_path, cache, RichModelSummary(max_depth=1), fast_dev_run=True)
    trained = sum(p.numel() for p in trainer.lightning_module.parameters() if p.requires_grad)
    assert f"Trainable params: {trained / 1000:.1f} K" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*was called without a model")  # Lightning looks for a checkpoint
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_an_exception_leaves_a_checkpoint_from_which_the_run_resumes(tmp_path, cache):
    def fail(trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            raise RuntimeError("the plug was pulled")

    saving = OnExceptionCheckpoint(str(tmp_path), "exception")
    with pytest.raises(RuntimeError, match="plug"):
        fit(tmp_path, cache, saving, LambdaCallback(on_train_batch_end=fail), enable_checkpointing=True)
    saved = torch.load(tmp_path / "exception.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert all("lora_" in name for name in saved["state_dict"])
    assert fit(tmp_path, cache, ckpt=tmp_path / "exception.ckpt").global_step == 8


def test_a_timer_ends_the_run(tmp_path, cache):
    assert fit(tmp_path, cache, Timer(timedelta(0)), max_epochs=50).global_step <= 4


def test_the_best_checkpoints_are_kept_and_hold_the_adapter_alone(tmp_path, cache):
    best = ModelCheckpoint(str(tmp_path), "{step}", monitor="val/loss", save_top_k=2, save_last=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*`trainer.logger` is None.*")
        trainer = fit(tmp_path, cache, best, EarlyStopping("val/loss"), max_epochs=3, enable_checkpointing=True)
    assert len(best.best_k_models) == 2
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {
        "last.ckpt",
        *(Path(path).name for path in best.best_k_models),
    }
    saved = torch.load(best.best_model_path, weights_only=True)
    assert all("lora_" in name for name in saved["state_dict"])
    loaded = Phi3LoRAModule.load_from_checkpoint(best.best_model_path, weights_only=True)
    (metrics,) = synthetic.trainer(tmp_path, limit_val_batches=1).validate(loaded, trainer.datamodule, verbose=False)
    assert metrics["val/loss"] == pytest.approx(best.best_model_score.item())


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_progress_bars_show_the_loss(tmp_path, cache, bar, capsys):
    fit(tmp_path, cache, bar(), ModelSummary(), enable_progress_bar=True, max_epochs=1)
    printed = capsys.readouterr()
    assert "Epoch 0" in printed.out + printed.err


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: StochasticWeightAveraging(1e-2), "StochasticWeightAveraging .*use WeightAveraging"),
        (lambda: GradientAccumulationScheduler({0: 2}), "GradientAccumulationScheduler .*accumulate_grad_batches"),
        (lambda: ModelPruning("l1_unstructured", amount=0.5), "ModelPruning .*model.lora.r"),
    ],
)
def test_what_cannot_work_is_refused_by_name_before_the_base_is_loaded(tmp_path, callback, message):
    module = Phi3LoRAModule("no base")
    with pytest.raises(ConfigError, match=rf"^trainer\.callbacks: {message}"):
        synthetic.trainer(tmp_path, callbacks=[callback()]).fit(module, synthetic.loader([]))
