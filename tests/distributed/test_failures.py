"""Whatever ends one rank ends all within a minute, and each reports which rank it was and why."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.callbacks import AgreedStop, RankFailure, RunCheckpoint
from phi3_lightning.callbacks.failure import HEARTBEAT_SECONDS
from phi3_lightning.checkpoint.io import read_checkpoint

from . import cases, ranks
from .conftest import LONG

STRATEGIES = {"ddp": "ddp", "fsdp2": {}}


class Trouble(Phi3LoRAModule):
    """Fails in its third step on one rank."""

    rank, how = 0, "raise"

    def training_step(self, batch, batch_idx):
        if batch_idx == 2 and self.global_rank == self.rank:
            if self.how == "vanish":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "hang":
                time.sleep(1000)
            if self.how == "bad row":
                batch["input_ids"][0, 0] = 10_000  # beyond the vocabulary
            if self.how == "raise":
                raise ValueError("the dog ate it")
        return super().training_step(batch, batch_idx)


def fit(folder, base, batches, strategy, world, *callbacks, kind=Trouble, **options):
    strategy = cases.fsdp2(**strategy) if isinstance(strategy, dict) else strategy
    callbacks = [*callbacks, RankFailure(patience=3, grace=2)]
    trainer = cases.trainer(folder, strategy, world, callbacks=callbacks, use_distributed_sampler=False, **options)
    rank = int(os.environ["LOCAL_RANK"])
    trainer.fit(cases.module(base, kind, gradient_checkpointing="none"), cases.loader(batches * 8, rank, world))


LISTENER = """
import sys, time, types
import torch.distributed as dist
from phi3_lightning.callbacks import RankFailure
store, how = sys.argv[1:]
dist.init_process_group("gloo", init_method=store, rank=1, world_size=2)
trainer = types.SimpleNamespace(world_size=2, global_rank=1)
callback = RankFailure()
callback.setup(trainer, None, "fit")
print("listening", flush=True)
sys.stdin.readline()
if how == "teardown":
    callback.teardown(trainer, None, "fit")
"""


def keep_the_store(port):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=2)
    torch.distributed.all_gather_object([None, None], "host")
    time.sleep(100)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["teardown", "exception"])
def test_a_listening_process_exits_cleanly(tmp_path, how):
    """The store answers while the interpreter shuts down: a thread still running then would abort the process."""
    port = ranks.free_port()
    (keeper,) = ranks.start(tmp_path, 1, keep_the_store, port)
    command = [sys.executable, "-c", LISTENER, f"tcp://127.0.0.1:{port}", how]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as listener:
        try:
            assert listener.stdout.readline() == "listening\n"
            keeper.kill(signal.SIGSTOP)
            time.sleep(2 * HEARTBEAT_SECONDS)  # now the thread waits for the store
            listener.stdin.write("\n")
            listener.stdin.flush()
            time.sleep(0.1)
            keeper.kill(signal.SIGCONT)
            assert listener.wait(30) == 0, listener.stderr.read()
        finally:
            keeper.kill()


def last_lines(rank: ranks.Rank) -> str:
    return "\n".join(rank.text.strip().splitlines()[-2:])


CAUSES = {"raise": "ValueError: the dog ate it", "bad row": "IndexError: index out of range"}


@pytest.mark.parametrize("how", CAUSES)
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_exception_on_one_rank_ends_all_and_is_named(base, batches, tmp_path, monkeypatch, strategy, failing, how):
    monkeypatch.setattr(Trouble, "rank", failing)
    monkeypatch.setattr(Trouble, "how", how)
    both = ranks.start(tmp_path, 2, fit, tmp_path, base, batches, STRATEGIES[strategy], 2)
    ranks.wait(both, 60)
    assert [rank.status for rank in both] == [1, 1]
    assert CAUSES[how] in last_lines(both[failing])
    other = last_lines(both[1 - failing])
    assert f"rank {1 - failing} ends because another did: rank {failing} on " in other
    assert CAUSES[how] in other


def test_a_base_that_differs_between_ranks_is_refused(base, batches, tmp_path):
    other = synthetic.save_tiny(tmp_path / "other", torch.bfloat16, **LONG)  # the same weights, rounded

    def fit_own() -> None:
        fit(tmp_path, [base, other][int(os.environ["LOCAL_RANK"])], batches, "ddp", 2, kind=Phi3LoRAModule, max_steps=2)

    both = ranks.start(tmp_path, 2, fit_own)
    ranks.wait(both, 60)
    assert [rank.status for rank in both] == [1, 1]
    for rank in both:
        assert "rank 1 has other frozen weights than rank 0; give every node the same files" in last_lines(rank)


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_vanishes_is_named(base, batches, tmp_path, monkeypatch, failing):
    monkeypatch.setattr(Trouble, "rank", failing)
    monkeypatch.setattr(Trouble, "how", "vanish")
    three = ranks.start(tmp_path, 3, fit, tmp_path, base, batches, "ddp", 3)
    ranks.wait(three, 60)
    for number, rank in enumerate(three):
        if number != failing:
            assert f"no sign of life from rank {failing} on " in last_lines(rank), rank.text
            assert rank.status == 1


def test_negative_control_without_the_callback_the_cause_is_unknown(base, batches, tmp_path, monkeypatch):
    monkeypatch.setattr(Trouble, "rank", 1)
    monkeypatch.setattr(RankFailure, "on_exception", lambda *args: None)
    both = ranks.start(tmp_path, 2, fit, tmp_path, base, batches, "ddp", 2)
    ranks.wait(both, 60)
    assert "the dog" not in both[0].text


class Stuck(Phi3LoRAModule):
    """One rank fails while the other waits where nothing can interrupt it, as in a NCCL kernel."""

    def training_step(self, batch, batch_idx):
        if self.global_rank == 1:
            raise ValueError("the dog ate it")
        threading.Event().wait()
        return super().training_step(batch, batch_idx)


def test_a_stuck_rank_is_ended(base, batches, tmp_path):
    both = ranks.start(tmp_path, 2, lambda: fit(tmp_path, base, batches, "ddp", 2, kind=Stuck))
    ranks.wait(both, 60)
    assert [rank.status for rank in both] == [1, 1]
    assert "error: rank 0 ends because another did: rank 1 on " in last_lines(both[0])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_full_disk_on_rank_0_ends_all_ranks(base, batches, tmp_path, strategy):
    """The checkpoint's path links to a device on which every write fails for lack of space."""
    full = tmp_path / "checkpoints" / "last.ckpt.tmp"
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")
    checkpoint = RunCheckpoint(str(tmp_path / "checkpoints"), every_n_steps=1)
    chosen = {"ddp": "ddp", "fsdp2": {}}[strategy]
    run = (tmp_path, base, batches, chosen, 2, checkpoint)
    both = ranks.start(tmp_path, 2, lambda: fit(*run, kind=Phi3LoRAModule, enable_checkpointing=True))
    ranks.wait(both, 60)
    assert [rank.status for rank in both] == [1, 1]
    for rank in both:
        assert "CheckpointError" in last_lines(rank), rank.text
        assert str(tmp_path / "checkpoints") in last_lines(rank)


class Paced(Phi3LoRAModule):
    """Trains slowly, and shows its progress."""

    def training_step(self, batch, batch_idx):
        print(f"batch {batch_idx}", flush=True)
        time.sleep(0.05 * (1 + self.global_rank))
        return super().training_step(batch, batch_idx)


SLOW = [pytest.param([0], marks=pytest.mark.slow), pytest.param([1], marks=pytest.mark.slow)]


@pytest.mark.parametrize("signalled_ranks", [*SLOW, [0, 1]])
def test_sigterm_to_any_rank_saves_once_and_resumes(base, batches, tmp_path, signalled_ranks):
    folder = str(tmp_path / "checkpoints")

    def run(resume=None):
        callbacks = [RunCheckpoint(folder), AgreedStop()]
        trainer = cases.trainer(
            tmp_path, "ddp", 2, callbacks=callbacks, use_distributed_sampler=False, enable_checkpointing=True,
        )  # fmt: skip
        module = cases.module(base, Paced, gradient_checkpointing="none")
        if resume:
            module.on_fit_start = lambda: Phi3LoRAModule.on_fit_start(module)
        seen = read_checkpoint(Path(resume))["global_step"] if resume else 0
        loader = cases.loader(batches * 8, int(os.environ["LOCAL_RANK"]), 2, seen)
        trainer.fit(module, loader, ckpt_path=resume)
        return trainer.global_step, torch.cat([p.detach().flatten() for p in module.trained_parameters()])

    both = ranks.start(tmp_path, 2, run)
    while not all("batch 3" in rank.text for rank in both):
        time.sleep(0.01)
    for rank in signalled_ranks:
        os.kill(both[rank].pid, signal.SIGTERM)
        time.sleep(0.03)
    ranks.wait(both, 60)
    assert all("SIGTERMException" in last_lines(rank) for rank in both)
    done = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"]
    assert 4 <= done < 16
    assert all(f"batch {done - 1}" in rank.text and f"batch {done}\n" not in rank.text for rank in both)
    (steps, weights), _ = ranks.run(tmp_path, 2, run, f"{folder}/last.ckpt")
    assert steps == 16
    straight = ranks.run(tmp_path, 2, run)[0][1]
    assert torch.equal(weights, straight)


def test_the_loader_gives_each_rank_as_many_batches(batches):
    assert len(list(cases.loader(batches[:3], 0, 2))) == len(list(cases.loader(batches[:3], 1, 2)))
    assert synthetic.VOCABULARY < 10_000
