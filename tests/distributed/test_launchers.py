"""The command line as users start it on several ranks: by Lightning's launcher, by torchrun, and as a batch job."""

import os
import re
import signal
import sys
from pathlib import Path

import psutil
import pytest

from cli.conftest import REPOSITORY, TINY
from phi3_lightning.checkpoint.io import read_checkpoint

from .programs import LAST, LENGTH, STEPS, TWO, finished, running, same, wait_for
from .ranks import free_port

pytestmark = pytest.mark.slow
OVERLAYS = REPOSITORY / "configs/overlays"


@pytest.mark.parametrize("overlay", ["ddp", "fsdp2"])
def test_an_overlay_trains_and_predicts(cli, tmp_path, overlay):
    two = f"--config={OVERLAYS}/{overlay}.yaml"
    fit = ("fit", two, *TWO, "--trainer.val_check_interval=4", "--trainer.limit_val_batches=1")
    assert cli(*fit, "--trainer.max_steps=4").text.count("4 optimiser steps") == 1  # printed by one rank
    assert read_checkpoint(tmp_path / LAST)["global_step"] == 4
    # a checkpoint of two ranks answers on one
    predict = ("predict", *TWO, f"--data.predict={TINY}/prompts.jsonl", "--trainer.devices=1")
    cli(*predict)
    alone = (tmp_path / "runs/bot/predictions.jsonl").read_text()
    cli(*predict, two, "--trainer.devices=2")
    assert (tmp_path / "runs/bot/predictions.jsonl").read_text() == alone


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook"])
def test_forked_ranks_exit_cleanly_and_resume(cli, tmp_path, strategy):
    fit = ("fit", *TWO, f"--trainer.strategy={strategy}", "--trainer.max_steps=4", "--trainer.limit_val_batches=2")
    cli(*fit)
    assert read_checkpoint(tmp_path / LAST)["global_step"] == 4
    assert "nothing left to do" in cli(*fit).text


def test_spawned_ranks_are_refused_before_anything_is_written(cli, tmp_path):
    text = cli("fit", *TWO, "--trainer.strategy=ddp_spawn", code=1).text
    assert "error: trainer.strategy: ddp_spawn" in text
    assert "use ddp" in text
    assert "Traceback" not in text
    assert not (tmp_path / "runs").exists()


NOTEBOOK = """
import os, sys, tempfile, torch, lightning.pytorch as pl
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.checkpoint.io import SafeCheckpointIO

def main(tiny, strategy, safe):
    saved = torch.save
    def note(what, file, *more, **options):
        with open("sent.txt", "a") as notes:
            notes.write(f"{sorted(what.get('state_dict', what))}")
        saved(what, file, *more, **options)
    torch.save = note
    module = Phi3LoRAModule(tiny, optimizer={"lr": 1e-2}, gradient_checkpointing="none")
    data = ChatDataModule(train=f"{tiny}/chats_train.jsonl", tokenizer=tiny, val=f"{tiny}/chats_val.jsonl",
                          max_length=256, num_workers=0, cache_dir="cache")
    quiet = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                 enable_checkpointing=False, limit_val_batches=4, plugins=[SafeCheckpointIO()] if safe else [])
    trainer = pl.Trainer(devices=2, strategy=strategy, max_steps=4, num_sanity_val_steps=0, **quiet)
    trainer.fit(module, data)
    two = {"devices": 2, "strategy": strategy, "limit_val_batches": 2}
    one = {"devices": 1}
    again = pl.Trainer(**quiet | (one if strategy == "ddp_spawn" else two))  # whose processes take longest to start
    (again,) = again.validate(module, data, verbose=False)
    (tuned,) = pl.Trainer(devices=1, **quiet).validate(module, data, verbose=False)
    (base,) = pl.Trainer(devices=1, **quiet).validate(Phi3LoRAModule(tiny), data, verbose=False)
    print("RESULT", tuned["val/loss"], again["val/loss"], base["val/loss"])

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "safe")
"""


@pytest.mark.parametrize(("strategy", "io"), [("ddp_notebook", "plain"), ("ddp_spawn", "safe")])
def test_the_adapter_returns_to_the_parent_of_forked_ranks(tmp_path, strategy, io):
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    text = finished(tmp_path, sys.executable, "notebook.py", str(TINY), strategy, io, TMPDIR=str(temporary))
    tuned, again, base = map(float, text.split("RESULT ")[1].split()[:3])
    assert tuned < base - 1
    assert again == pytest.approx(tuned)
    assert list(temporary.rglob("*.ckpt")) == []
    if strategy != "ddp_spawn":  # a spawned process imports torch again, without the patched torch.save
        sent = (tmp_path / "sent.txt").read_text()
        assert "lora_B" in sent
        assert "embed_tokens" not in sent


def test_a_bad_row_is_the_last_line_of_the_output(cli, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "cat", "content": "x"}]}\n')
    arguments = (f"--config={OVERLAYS}/ddp.yaml", *TWO, "--data.train=bad.jsonl", "--data.val=null")
    run = cli("fit", *arguments, code=1)
    wait_for(lambda: "error: rank 1 ends because another did" in run.text, lambda: run.text)  # it may outlive rank 0
    assert "bad.jsonl:1" in "\n".join(run.text.strip().splitlines()[-8:])


FRESH = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it a second attempt finds the first one's addresses in the store, and connects to dead processes."""


def torchrun(port: int, restarts: int = 0) -> tuple[str, ...]:
    return (
        sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", f"--max-restarts={restarts}",
        "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--", str(REPOSITORY / "cli.py"),
    )  # fmt: skip


def test_torchrun_restarts_after_a_killed_worker(uninterrupted, tmp_path):
    arguments = (
        "fit", f"--config={OVERLAYS}/torchrun.yaml", *TWO, *LENGTH, "--trainer.num_nodes=1",
        "--checkpoint.every_n_steps=5",
    )  # fmt: skip
    cut = tmp_path / "cut"
    with running(cut, *torchrun(free_port(), restarts=1), *arguments, **FRESH) as (agent, text):
        wait_for(lambda: (cut / LAST).exists(), text)
        workers = [p for p in psutil.Process(agent.pid).children(recursive=True) if "cli.py" in " ".join(p.cmdline())]
        workers[-1].send_signal(signal.SIGKILL)
        assert agent.wait(200) == 0, text()
        assert "resuming after step" in text()
    assert same(uninterrupted, cut)


SRUN = """#!/usr/bin/env bash
# What srun does here: as many tasks as the job has, signals handed on, the highest exit status returned.
while [[ $1 == --* ]]; do shift; done
pids=()
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 SLURM_STEP_ID=0 "$@" & pids+=($!)
done
trap 'kill -TERM "${pids[@]}"' TERM
status=0
for pid in "${pids[@]}"; do
  while true; do
    wait "$pid"; code=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  (( code > status )) && status=$code
done
exit $status
"""


def slurm(folder: Path, **changes: str) -> dict[str, str]:
    """The environment of a job, and stand-ins for SLURM's programs."""
    programs = folder / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    for name, text in {
        "srun": SRUN,
        "scontrol": '#!/bin/sh\necho "$@" >> scontrol.txt\n',
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    if not (folder / "cli.py").exists():
        (folder / "cli.py").symlink_to(REPOSITORY / "cli.py")
        (folder / "configs").symlink_to(REPOSITORY / "configs")
    return {
        "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "phi3-lora",
        "SLURM_NNODES": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    } | changes  # fmt: skip


def test_a_batch_job_saves_requeues_and_resumes(uninterrupted, tmp_path):
    script = ("bash", str(OVERLAYS / "slurm.sbatch"))
    arguments = (*TWO, *LENGTH)
    cut = tmp_path / "cut"
    with running(cut, *script, *arguments, **slurm(cut)) as (job, text):
        wait_for(lambda: re.search(r"batch \d+/.*step [1-9]", text()) is not None, text)
        srun = psutil.Process(job.pid).children()[0]
        srun.send_signal(signal.SIGTERM)  # as SLURM does with --signal=TERM@120
        assert job.wait(100) == 0, text()
    assert (cut / "scontrol.txt").read_text() == "requeue 4711\n"
    assert 0 < read_checkpoint(cut / LAST)["global_step"] < STEPS
    finished(cut, *script, *arguments, **slurm(cut))  # the same command
    assert (cut / "scontrol.txt").read_text() == "requeue 4711\n"
    assert same(uninterrupted, cut)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"SLURM_NTASKS": "3"}, "3 tasks are not 1 nodes x 2"), ({"SLURM_GPUS_ON_NODE": "4"}, "4 GPUs and 2 tasks")],
)
def test_a_batch_job_with_wrong_tasks_is_refused(tmp_path, changes, message):
    environment = slurm(tmp_path, **changes)
    assert message in finished(tmp_path, "bash", str(OVERLAYS / "slurm.sbatch"), *TWO, code=2, **environment)
