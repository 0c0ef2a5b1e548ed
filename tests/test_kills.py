"""A run that is killed at any moment resumes from its last checkpoint to the same final weights.

``KILLS`` is the number of kills: a few in the suite, 200 in ``make kill-test``.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.callbacks import RunCheckpoint
from phi3_lightning.checkpoint.io import SafeCheckpointIO, read_checkpoint

TINY = Path(__file__).parents[1] / "src/phi3_lightning/assets/tiny_phi3"
KILLS = int(os.environ.get("KILLS", "6"))
STEPS = 16


def train(folder: Path, cache: Path) -> None:
    """Train to the end, from the last checkpoint if there is one; every step is saved."""
    pl.seed_everything(5, verbose=False)
    module = Phi3LoRAModule(
        str(TINY), lora={"r": 4, "lora_dropout": 0.2}, optimizer={"lr": 1e-2}, gradient_checkpointing="none"
    )
    data = ChatDataModule(
        train=str(TINY / "chats_val.jsonl"), tokenizer=str(TINY), val_fraction=0.1, max_length=128, batch_size=1,
        packing=False, num_workers=0, cache_dir=str(cache),
    )  # fmt: skip
    checkpoint = RunCheckpoint(str(folder), every_n_steps=1)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=STEPS, accumulate_grad_batches=2, val_check_interval=6, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
        callbacks=[checkpoint], plugins=[SafeCheckpointIO()],
    )  # fmt: skip
    last = folder / "last.ckpt"
    trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)


def start(folder: Path, cache: Path) -> int:
    """Fork a run from this process, with its imports."""
    folder.mkdir(exist_ok=True)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
            train(folder, cache)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int, seconds: float) -> int | None:
    """The exit code of a run, or None if it does not end within ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def steps_of(folder: Path) -> int:
    """The step of the last checkpoint, which must be readable; 0 if there is none yet."""
    last = folder / "last.ckpt"
    return read_checkpoint(last)["global_step"] if last.exists() else 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = read_checkpoint(folder / "last.ckpt")
    moments = {
        f"{index} {name}": value
        for index, state in checkpoint["optimizer_states"][0]["state"].items()
        for name, value in state.items()
    }
    return checkpoint["state_dict"] | moments


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    begun = time.monotonic()
    pid = start(folder / "run", folder / "cache")
    assert exit_code(pid, 120) == 0, (folder / "run" / "output.txt").read_text()
    return folder, time.monotonic() - begun


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_weights(tmp_path, whole):
    folder, seconds = whole
    expected, chance = weights(folder / "run"), random.Random(0)
    kills = finished = runs = 0
    writing = []
    run = tmp_path / "0"
    while kills < KILLS or finished == 0:
        before = steps_of(run)
        pid = start(run, folder / "cache")
        code = exit_code(pid, chance.uniform(0, seconds)) if kills < KILLS else exit_code(pid, 120)
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
            writing.append((run / "last.ckpt.tmp").exists())
            assert before <= steps_of(run) <= STEPS  # the checkpoint is readable and never older
            continue
        assert code == 0, (run / "output.txt").read_text()
        found = weights(run)
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []
        finished += 1
        runs += 1
        run = tmp_path / str(runs)
    print(f"{kills} kills, {sum(writing)} while a checkpoint was being written; {finished} runs came to their end")
