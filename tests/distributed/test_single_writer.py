"""A folder locked by another fit ends all ranks, and none waits for one that has ended."""

import os
import time

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from phi3_lightning.callbacks import RankFailure, SingleWriter
from phi3_lightning.run_lock import RunLock

from . import cases, ranks


def hold(folder) -> None:
    RunLock(folder).acquire()
    (folder / "held").touch()
    time.sleep(100)


def fit(folder, base, batches, ahead: bool) -> None:
    writer = SingleWriter(folder / "run")
    trainer = cases.trainer(folder, "ddp", 2, callbacks=[writer, RankFailure(patience=3, grace=2)], max_steps=2)
    trainer.loggers = [TensorBoardLogger(folder / "run", name="", version="")]
    if ahead:
        writer.claim(trainer)
    trainer.fit(cases.module(base), cases.loader(batches, int(os.environ["LOCAL_RANK"]), 2))


@pytest.mark.parametrize("ahead", [True, False], ids=["claimed ahead", "claimed in setup"])
def test_all_ranks_are_refused(base, batches, tmp_path, ahead):
    (holder,) = ranks.start(tmp_path / "holder", 1, hold, tmp_path / "run")
    while not (tmp_path / "run" / "held").exists():
        time.sleep(0.01)
    both = ranks.start(tmp_path / "ranks", 2, fit, tmp_path, base, batches, ahead)
    try:
        ranks.wait(both, 60)
    finally:
        holder.kill()
    for rank in both:
        assert rank.status == 1
        assert f"run is in use: process {holder.pid} on " in rank.text.strip().splitlines()[-1]
    if ahead:
        assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "held"}


def test_ranks_share_a_folder_that_is_free(base, batches, tmp_path):
    ranks.run(tmp_path / "ranks", 2, fit, tmp_path, base, batches, True)
    assert not (tmp_path / "run" / ".lock").exists()
