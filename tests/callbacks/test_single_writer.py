"""One fit at a time writes to a run's folder, in any Trainer."""

import os
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

import synthetic
from phi3_lightning.callbacks import SingleWriter
from phi3_lightning.errors import ConfigError
from phi3_lightning.run_lock import RunLock


class LockProbe(pl.LightningModule):
    """Tests in each step, from another process, whether a folder is locked."""

    def __init__(self, folder: Path, fail: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.folder, self.fail = folder, fail
        self.answers: list[bool] = []

    def training_step(self, batch, batch_idx):
        self.answers.append(in_use(self.folder))
        if self.fail:
            raise ValueError("in the middle of a step")
        return self.layer(batch.float()).sum()

    def validation_step(self, batch, batch_idx):
        self.answers.append(in_use(self.folder))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def in_use(folder: Path) -> bool:
    pid = os.fork()
    if pid == 0:
        lock = RunLock(folder)
        try:
            lock.acquire()
            lock.release()
            os._exit(0)
        except ConfigError:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


@pytest.fixture
def locked_folder(tmp_path):
    """A folder that another process has locked."""
    ready, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        RunLock(tmp_path / "run").acquire()
        os.write(write_end, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    yield tmp_path / "run"
    os.kill(pid, 9)
    os.waitpid(pid, 0)


DATA = torch.utils.data.DataLoader(torch.zeros(2, 1))


def trainer(folder: Path, **options) -> pl.Trainer:
    return synthetic.trainer(folder, callbacks=[SingleWriter(folder / "run")], **options)


def test_a_fit_holds_its_folder_to_its_end(tmp_path):
    module = LockProbe(tmp_path / "run")
    for _ in range(2):  # one after the other, in one process
        trainer(tmp_path).fit(module, DATA)
        assert not in_use(tmp_path / "run")
    assert module.answers == [True] * 4


def test_a_failed_fit_releases_its_folder(tmp_path):
    with pytest.raises(ValueError, match="in the middle"):
        trainer(tmp_path).fit(LockProbe(tmp_path / "run", fail=True), DATA)
    assert not in_use(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_second_fit_is_refused_and_writes_nothing(locked_folder, tmp_path):
    module = LockProbe(locked_folder)
    with pytest.raises(ConfigError, match="run is in use: process"):
        trainer(tmp_path).fit(module, DATA)
    with pytest.raises(ConfigError, match="run is in use: process"):
        SingleWriter(locked_folder).claim(synthetic.trainer(tmp_path))
    assert module.answers == []
    assert [path.name for path in locked_folder.iterdir()] == [".lock"]


def test_validation_runs_in_a_locked_folder(locked_folder, tmp_path):
    trainer(tmp_path).validate(LockProbe(locked_folder), DATA, verbose=False)


def test_fast_dev_run_locks_no_folder(tmp_path):
    module = LockProbe(tmp_path / "run")
    trainer(tmp_path, fast_dev_run=True).fit(module, DATA)
    assert module.answers == [False]


def test_a_folder_can_be_locked_before_loggers_start(tmp_path):
    writer, module = SingleWriter(tmp_path / "run"), LockProbe(tmp_path / "run")
    run = synthetic.trainer(tmp_path, callbacks=[writer])
    writer.claim(run)
    assert in_use(tmp_path / "run")
    run.fit(module, DATA)
    assert module.answers == [True, True]
    assert not in_use(tmp_path / "run")
