"""Loggers besides TensorBoard, offline and for real: numbers in all, text and tables in those that show them."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

import synthetic
from callbacks.test_samples import chats, tiny
from phi3_lightning.batch import IGNORE_INDEX
from phi3_lightning.callbacks import Samples, TensorBoardSamples
from phi3_lightning.callbacks.tensorboard import log_page

NUMBERS = {"train/loss", "val/loss", "lr-AdamW/lora_B"}
EVIL = "<script>alert(1)</script>"


def fit(folder: Path, logger):
    """Two validations with two answers each."""
    trainer = synthetic.trainer(
        folder,
        callbacks=[LearningRateMonitor(), TensorBoardSamples(2), Samples(prompts=2)],
        logger=logger,
        log_every_n_steps=1,
        max_steps=2,
        max_epochs=-1,
        val_check_interval=1,
        limit_val_batches=1,
    )
    torch.manual_seed(0)
    data = chats(folder, packing=False, batch_size=4)
    trainer.fit(tiny(), data)
    data.trainer = None
    batch = next(iter(data.train_dataloader()))
    labels = batch["labels"][0]
    return trainer, data.tokenizer.decode(labels[labels != IGNORE_INDEX][:3])


def test_csv_files_have_the_numbers(tmp_path):
    fit(tmp_path, CSVLogger(tmp_path, name="csv", version=""))
    assert set((tmp_path / "csv/metrics.csv").read_text().splitlines()[0].split(",")) >= NUMBERS


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_wandb_has_a_table_of_answers_and_a_page_of_rows(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    logger = WandbLogger(project="bot", offline=True, save_dir=str(tmp_path))
    trainer, trained = fit(tmp_path, logger)
    log_page(trainer, "config", f"<pre>{EVIL}</pre>", 1)
    assert set(logger.experiment.summary.keys()) >= NUMBERS | {"samples", "data/first_rows", "config"}
    media = Path(logger.experiment.dir) / "media"
    logger.experiment.finish()
    tables = [json.loads(path.read_text()) for path in sorted(media.rglob("*.table.json"))]
    assert [table["columns"] for table in tables] == [["step", "prompt", "base", "tuned"]] * 2
    assert sorted(row[0] for table in tables for row in table["data"]) == [0, 0, 1, 1]
    (page,) = media.rglob("first_rows*.html")
    assert f"<strong>{trained}" in page.read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_mlflow_has_a_table_of_answers_and_a_page_of_rows(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    database = f"sqlite:///{tmp_path}/mlflow.db"
    logger = MLFlowLogger("bot", tracking_uri=database, artifact_location=str(tmp_path / "files"))
    _, trained = fit(tmp_path, logger)
    client = mlflow.MlflowClient(tracking_uri=database)
    run = client.get_run(logger.run_id).data
    assert run.metrics.keys() >= NUMBERS
    assert run.params["optimizer/lr"] == "0.01"
    assert [point.step for point in client.get_metric_history(logger.run_id, "train/loss")] == [0, 1]
    files = tmp_path / "files" / logger.run_id / "artifacts"
    table = json.loads((files / "samples.json").read_text())
    assert table["columns"] == ["step", "prompt", "base", "tuned"]
    assert [row[0] for row in table["data"]] == [0, 0, 1, 1]
    assert f"<strong>{trained}" in (files / "data/first_rows.html").read_text()


def test_a_rank_that_does_not_write_logs_no_text(tmp_path, monkeypatch):
    logger = TensorBoardLogger(tmp_path)
    trainer = synthetic.trainer(tmp_path, logger=logger)
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    log_page(trainer, "config", "text", 0)
    assert not list(tmp_path.rglob("events.*"))
