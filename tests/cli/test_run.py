"""A run from the command line: the files it writes, and how it resumes."""

import json
import re
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cli.conftest import QUICK, REPOSITORY, TINY, start


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def same(left: Path, right: Path) -> bool:
    a, b = weights(left), weights(right)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_one_folder_with_everything(cli, tmp_path):
    run = cli("fit", *QUICK, "--run=bot", "--trainer.max_steps=6", "--trainer.val_check_interval=3")
    folder = tmp_path / "runs/bot"
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "checkpoints", "tensorboard"}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    curves = scalars(folder / "tensorboard")
    assert {
        "train/loss", "train/lr", "train/grad_norm", "val/loss", "val/perplexity", "val/token_accuracy",
        "speed/tokens_per_second", "speed/supervised_tokens_per_second", "memory/peak_gb",
    } <= curves.keys()  # fmt: skip
    assert [step for step, _ in curves["train/loss"]] == list(range(6))  # one point per step
    assert [step for step, _ in curves["val/loss"]] == [2, 5]
    for line in ("320 rows read", "6 optimiser steps", "qkv_proj", "trainable 155,648", "last.ckpt"):
        assert line in run.text


def test_the_step_axis_counts_optimiser_steps_under_accumulation(cli, tmp_path):
    cli("fit", *QUICK, "--trainer.accumulate_grad_batches=4", "--trainer.max_steps=3", "--trainer.limit_val_batches=1")
    curves = scalars(tmp_path / "runs/phi3-lora/tensorboard")
    assert [step for step, _ in curves["train/loss"]] == [0, 1, 2]
    assert [step for step, _ in curves["train/lr"]] == [0, 1, 2]
    assert [step for step, _ in curves["speed/tokens_per_second"]] == [0, 1, 2]


def test_no_file_of_a_run_holds_a_base_weight(cli, tmp_path):
    cli("fit", *QUICK, "--trainer.max_steps=2")
    checkpoint = torch.load(tmp_path / "runs/phi3-lora/checkpoints/last.ckpt", weights_only=True)
    assert {name for name in checkpoint["state_dict"] if "lora_" not in name} == set()
    values = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    assert values == 155_648
    size = sum(path.stat().st_size for path in (tmp_path / "runs").rglob("*.ckpt"))
    assert size <= 2 * (values * 12 + 150_000)  # two files of value and two moments, and the names of 32 tensors
    assert "/" not in str(checkpoint["phi3_lightning"]["base"])  # a local path is useless elsewhere


def test_the_same_command_resumes_and_logs_it(cli, tmp_path):
    folder = tmp_path / "runs/phi3-lora"
    cli("fit", *QUICK, "--run=whole", "--trainer.max_steps=8", "--model.schedule.name=constant")
    cli("fit", *QUICK, "--trainer.max_steps=3", "--model.schedule.name=constant")
    more = cli("fit", *QUICK, "--trainer.max_steps=8", "--model.schedule.name=constant")
    assert "resuming after step 3" in more.text
    assert same(folder / "checkpoints/last.ckpt", tmp_path / "runs/whole/checkpoints/last.ckpt")
    for _ in range(2):
        done = cli("fit", *QUICK, "--trainer.max_steps=8", "--model.schedule.name=constant")
        assert "nothing left to do: trainer.max_steps 8 is reached" in done.text
    assert (folder / "config.yaml").is_file()
    assert yaml.safe_load((folder / "config.1.yaml").read_text())["trainer"]["max_steps"] == 3


def test_a_changed_learning_rate_is_honoured(cli, tmp_path):
    options = (*QUICK, "--model.schedule={name: constant, warmup: 0}")
    cli("fit", *options, "--trainer.max_steps=2")
    cli("fit", *options, "--trainer.max_steps=4", "--model.optimizer.lr=0.002", "--model.optimizer.weight_decay=0.1")
    rates = scalars(tmp_path / "runs/phi3-lora/tensorboard")["train/lr"]
    assert [(step, pytest.approx(rate)) for step, rate in rates] == [(0, 0.01), (1, 0.01), (2, 0.002), (3, 0.002)]
    checkpoint = torch.load(tmp_path / "runs/phi3-lora/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["weight_decay"] == 0.1


def test_an_early_stopped_run_stays_stopped(cli):
    stop = '--trainer.callbacks=[{"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 1}}]'
    options = (*QUICK, stop, "--model.optimizer.lr=0.5", "--trainer.val_check_interval=2", "--trainer.max_epochs=9",
               "--trainer.gradient_clip_val=1", "--trainer.limit_val_batches=2")  # fmt: skip
    cli("fit", *options)
    assert "early stopping ended it" in cli("fit", *options).text


def test_resume_never_refuses_a_used_folder(cli, tmp_path):
    cli("fit", *QUICK, "--trainer.max_steps=1")
    before = (tmp_path / "runs/phi3-lora/checkpoints/last.ckpt").read_bytes()
    refused = cli("fit", *QUICK, "--trainer.max_steps=2", "--resume=never", code=1)
    assert "runs/phi3-lora is not empty; give another name with --run" in refused.text
    assert (tmp_path / "runs/phi3-lora/checkpoints/last.ckpt").read_bytes() == before


def test_an_unreadable_checkpoint_is_an_error_not_a_fresh_start(cli, tmp_path):
    cli("fit", *QUICK, "--trainer.max_steps=1", "--trainer.val_check_interval=1")
    last = tmp_path / "runs/phi3-lora/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    refused = cli("fit", *QUICK, "--trainer.max_steps=2", code=1)
    assert "last.ckpt: not a whole checkpoint" in refused.text
    last.unlink()
    refused = cli("fit", *QUICK, "--trainer.max_steps=2", code=1)
    assert "best.ckpt and no last.ckpt" in refused.text


def test_a_moved_run_folder_resumes_and_keeps_its_best(cli, tmp_path):
    options = (*QUICK, "--trainer.val_check_interval=2", "--model.schedule.name=constant")
    cli("fit", *options, "--trainer.max_steps=4", "--run=old")
    (tmp_path / "runs/old").rename(tmp_path / "runs/new")
    best = torch.load(tmp_path / "runs/new/checkpoints/best.ckpt", weights_only=True)["callbacks"]
    cli("fit", *options, "--trainer.max_steps=6", "--run=new")
    last = torch.load(tmp_path / "runs/new/checkpoints/last.ckpt", weights_only=True)["callbacks"]
    scores = [next(state["best_score"] for key, state in c.items() if "RunCheckpoint" in key) for c in (best, last)]
    assert scores[1] <= scores[0]


FORTY_STEPS = (
    *QUICK, "--trainer.max_steps=40", "--trainer.val_check_interval=20", "--trainer.limit_val_batches=2",
    "--checkpoint.every_n_steps=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """The last checkpoint of a run that was never killed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = start(folder, "fit", *FORTY_STEPS, "--run=whole")
    assert run.wait() == 0, run.text
    return folder / "runs/whole/checkpoints/last.ckpt"


@pytest.mark.parametrize(
    "sent",
    [signal.SIGKILL, *(pytest.param(other, marks=pytest.mark.slow) for other in (signal.SIGTERM, signal.SIGINT))],
)
def test_a_killed_run_resumes_to_the_same_weights(cli, tmp_path, uninterrupted, sent):
    last = tmp_path / "runs/cut/checkpoints/last.ckpt"
    for _ in range(2):
        run = start(tmp_path, "fit", *FORTY_STEPS, "--run=cut")
        before = last.stat().st_mtime_ns if last.exists() else 0
        run.wait_for(lambda before=before: last.exists() and last.stat().st_mtime_ns > before)
        run.kill(sent)
        run.wait()
        assert run.status == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 1}[sent], run.text
        step = torch.load(last, weights_only=True)["global_step"]
        assert 1 <= step < 40
    resumed = cli("fit", *FORTY_STEPS, "--run=cut")
    assert f"step {step}" in resumed.text
    assert same(last, uninterrupted)


def test_sigterm_saves_a_checkpoint_before_stopping(tmp_path):
    options = (*QUICK, "--trainer.max_steps=10000", "--trainer.limit_val_batches=0")
    run = start(tmp_path, "fit", *options)
    events = tmp_path / "runs/phi3-lora/tensorboard"
    run.wait_for(lambda: events.is_dir() and "train/loss" in run.text)
    run.kill(signal.SIGTERM)
    assert run.wait(30) == 143, run.text
    assert torch.load(tmp_path / "runs/phi3-lora/checkpoints/last.ckpt", weights_only=True)["global_step"] > 0


@pytest.mark.slow
def test_sigterm_within_a_validation_repeats_it(cli, tmp_path):
    options = (*QUICK, "--trainer.max_steps=8", "--trainer.val_check_interval=4", "--checkpoint.every_n_steps=1")
    cli("fit", *options, "--run=whole")
    script = tmp_path / "stop.py"
    script.write_text(
        "import os, signal\n"
        "from lightning.pytorch import Callback\n"
        "class Stop(Callback):\n"
        "    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):\n"
        "        if not trainer.sanity_checking and batch_idx == 2:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    stop = start(tmp_path, "fit", *options, "--run=cut", "--trainer.callbacks=[{class_path: stop.Stop}]")
    assert stop.wait() == 143, stop.text
    cli("fit", *options, "--run=cut")
    losses = [scalars(tmp_path / f"runs/{name}/tensorboard")["val/loss"] for name in ("whole", "cut")]
    assert losses[1] == losses[0]


def test_a_saved_config_feeds_every_command(cli, tmp_path):
    cli(
        "fit", *QUICK, f"--data.predict={TINY}/prompts.jsonl", "--trainer.max_steps=2", "--trainer.val_check_interval=1"
    )
    config = "--config=runs/phi3-lora/config.yaml"
    validated = cli("validate", config)
    assert "best.ckpt: taken" in validated.text
    assert "val/loss" in validated.text
    assert "token loss" in cli("test", config, f"--data.test={TINY}/chats_val.jsonl", "--evaluation.rows=2").text
    cli("predict", config)
    answers = [json.loads(line) for line in (tmp_path / "runs/phi3-lora/predictions.jsonl").read_text().splitlines()]
    assert [answer["place"] for answer in answers] == [f"{TINY}/prompts.jsonl:{line}" for line in (1, 2, 3)]
    assert all(isinstance(answer["answer"], str) and isinstance(answer["finished"], bool) for answer in answers)
    assert "nothing left to do" in cli("fit", config).text


def test_predictions_name_line_id_and_prompt_of_their_rows(cli, tmp_path):
    path = REPOSITORY / "tests/cases/f07.p.jsonl"
    table = tmp_path / "table.csv"
    table.write_text("ticket,from,body\n12,user,Do you sell maps?\nx9,user,Are you open?\n")
    columns = ("--data.conversation_column=ticket", "--data.role_column=from", "--data.content_column=body")
    for given, options, expected in (
        (path, ("--data.on_bad_row=skip",), [
            {"place": f"{path}:1", "id": "When are you open on Monday?", "question": "When are you open on Monday?"},
            {"place": f"{path}:3", "id": "Do you sell songs?", "question": "Do you sell songs?"},
        ]),
        (table, columns, [
            {"place": f"{table} row 2", "id": "12", "question": "Do you sell maps?"},
            {"place": f"{table} row 3", "id": "x9", "question": "Are you open?"},
        ]),
    ):  # fmt: skip
        cli("predict", *QUICK, f"--data.predict={given}", *options)
        lines = [json.loads(line) for line in (tmp_path / "runs/phi3-lora/predictions.jsonl").read_text().splitlines()]
        assert [(line["place"], line["id"]) for line in lines] == [(row["place"], row["id"]) for row in expected]
        assert [line.keys() for line in lines] == [{"place", "id", "prompt", "answer", "finished"}] * 2
        for line, row in zip(lines, expected, strict=True):
            assert row["question"] in line["prompt"]
            assert line["prompt"].startswith("<|user|>")
            assert line["prompt"].endswith("<|assistant|>")


def test_what_the_user_types_wins_over_the_checkpoint(cli, tmp_path):
    cli("fit", *QUICK, "--trainer.max_steps=2")
    cli("fit", *QUICK, "--trainer.max_steps=3", "--model.lora.lora_dropout=0.3")
    checkpoint = torch.load(tmp_path / "runs/phi3-lora/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["lora"]["lora_dropout"] == 0.3
    refused = cli("fit", *QUICK, "--trainer.max_steps=4", "--model.lora.r=8", code=1)
    assert "model.lora.r is 8 and was 16" in refused.text


@pytest.mark.parametrize(
    "option",
    ["--trainer.fast_dev_run=true", "--trainer.overfit_batches=2", "--trainer.limit_train_batches=3",
     "--trainer.limit_val_batches=1", "--trainer.val_check_interval=0.5", "--trainer.logger=false",
     "--trainer.precision=bf16-true", "--trainer.precision=bf16-mixed"],
)  # fmt: skip
def test_options_of_the_trainer_work_as_documented(cli, tmp_path, option):
    run = cli("fit", *QUICK, "--data.max_length=1024", "--trainer.max_epochs=1", "--trainer.max_steps=4", option)
    if "fast_dev_run" in option:
        assert not (tmp_path / "runs").exists()  # fast_dev_run writes nothing
    elif "logger=false" in option:
        assert not (tmp_path / "runs/phi3-lora/tensorboard").exists()
    assert re.search(r"optimiser steps", run.text)


def test_a_second_run_without_a_logger_resumes(cli):
    for steps in (1, 2):
        cli("fit", *QUICK, f"--trainer.max_steps={steps}", "--trainer.logger=false")


def test_a_run_too_weak_to_change_answers_is_warned_about(cli, monkeypatch):
    # pytest records warnings where a user's process prints them
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: print(message, file=sys.stderr))
    weak = cli("fit", *QUICK, "--trainer.max_steps=2", "--model.optimizer.lr=5e-6")
    assert "the answers will not change" in weak.text
    assert "the answers will not change" not in cli("fit", *QUICK, "--run=b", "--trainer.max_steps=2").text


def test_a_run_shorter_than_its_validation_interval_writes_last(cli, tmp_path):
    config = f"--config={REPOSITORY}/configs/phi3_mini_4k_lora.yaml"
    cli("fit", config, *QUICK, "--data.val=null", "--trainer.max_steps=1")
    assert (tmp_path / "runs/phi3-mini-4k/checkpoints/last.ckpt").is_file()
