"""A fit outside the main thread, as Ray Train runs it."""

import os
import signal
import threading

import pytest
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.exceptions import SIGTERMException

from phi3_lightning import callbacks as ours
from phi3_lightning.callbacks import AgreedStop, RankFailure, RunCheckpoint
from phi3_lightning.checkpoint.io import read_checkpoint

from . import cases, ranks


class StopBeforeStep(AgreedStop):
    """One rank requests a stop, as another of its threads or Lightning's signal handler would."""

    def __init__(self, rank: int, how: str) -> None:
        super().__init__()
        self.rank, self.how = rank, how

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_rank == self.rank and trainer.global_step == 2:
            if self.how == "asked":
                self.request()
            else:
                trainer._signal_connector.received_sigterm = True


def in_a_thread(function):
    """Return what ``function()`` raises or returns in a thread of its own, and the SIGTERM handler while it runs."""
    outcome = []

    def run():
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return outcome[0]


@pytest.mark.parametrize(("rank", "how"), [(0, "asked"), (1, "asked"), (1, "noted")])
def test_ranks_agree_on_a_stop_without_a_handler(base, batches, tmp_path, rank, how):
    def run():
        before = signal.getsignal(signal.SIGTERM)

        def fit():
            callbacks = [RunCheckpoint(str(tmp_path)), StopBeforeStep(rank, how), RankFailure(patience=3, grace=2)]
            trainer = cases.trainer(
                tmp_path, "ddp", 2, callbacks=callbacks, use_distributed_sampler=False, enable_checkpointing=True
            )
            own = cases.loader(batches * 8, int(os.environ["LOCAL_RANK"]), 2)
            trainer.fit(cases.module(base, gradient_checkpointing="none"), own)

        ended = in_a_thread(fit)
        return isinstance(ended, SIGTERMException), signal.getsignal(signal.SIGTERM) == before

    assert ranks.run(tmp_path / "ranks", 2, run) == [(True, True)] * 2
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3


def test_the_former_handler_is_back_after_a_fit(base, batches, tmp_path):
    def run():
        def own_handler(*_):
            pass

        signal.signal(signal.SIGTERM, own_handler)
        trainer = cases.trainer(tmp_path, "ddp", 2, callbacks=[AgreedStop()], use_distributed_sampler=False)
        own = cases.loader(batches, int(os.environ["LOCAL_RANK"]), 2)
        trainer.fit(cases.module(base, gradient_checkpointing="none"), own)
        return signal.getsignal(signal.SIGTERM) is own_handler

    assert ranks.run(tmp_path, 2, run) == [True, True]


def test_every_callback_of_the_command_line_works_in_a_thread(base, batches, tmp_path):
    def run():
        callbacks = [
            RunCheckpoint(str(tmp_path)), AgreedStop(), ours.PurgeOvertaken(), ours.RunReport(tmp_path),
            ours.PredictionWriter(tmp_path / "predictions.jsonl"), ours.OutOfMemory(), ours.RankFailure(),
            ours.BadRows(), ours.Throughput(None), ours.AdapterStatistics(), ours.TensorBoardSamples(),
            RichProgressBar(),
        ]  # fmt: skip
        trainer = cases.trainer(
            tmp_path, "auto", 1, callbacks=callbacks, enable_checkpointing=True, enable_progress_bar=True
        )
        trainer.fit(cases.module(base), cases.loader(batches, 0, 1), cases.loader(batches, 0, 1))
        return trainer.global_step

    (ended,) = ranks.run(tmp_path, 1, lambda: in_a_thread(run))
    assert ended == 4, ended
