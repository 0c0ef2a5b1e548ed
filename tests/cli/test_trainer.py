"""Options of the Trainer: each does what it says, or is refused in one line."""

import pytest
import torch
import yaml

from cli.conftest import QUICK, REPOSITORY, TINY

FIT = (*QUICK, "--trainer.max_steps=2", "--trainer.limit_val_batches=2")


def names(folder) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and "output" not in path.name}


def test_a_run_without_checkpoints_warns_that_it_cannot_resume(cli, tmp_path):
    run = cli("fit", *FIT, "--trainer.enable_checkpointing=false")
    assert "trainer.enable_checkpointing: false: no checkpoint is written" in run.text
    assert not list((tmp_path / "runs").rglob("*.ckpt"))
    assert "2 optimiser steps" in run.text
    cli("validate", *FIT, "--trainer.enable_checkpointing=false")


def test_without_a_checkpoint_callback_on_mismatch_still_applies(cli, tmp_path):
    cli("fit", *FIT)
    last = tmp_path / "runs/phi3-lora/checkpoints/last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["phi3_lightning"]["template"] = "another"
    torch.save(checkpoint, last)
    bare = ("--trainer.enable_checkpointing=false", "--ckpt_path=last")
    assert "template" in cli("validate", *FIT, *bare, code=1).text
    cli("validate", *FIT, *bare, "--checkpoint.on_mismatch=warn")


def test_barebones_runs_without_logger_checkpoint_and_progress_bar(cli, tmp_path):
    config = REPOSITORY / "configs/quickstart.yaml"  # it has options that barebones switches off
    assert yaml.safe_load(config.read_text())["trainer"]["num_sanity_val_steps"] == -1
    run = cli("fit", f"--config={config}", *FIT, "--trainer.barebones=true", "--data.predict=null", "--run=bot")
    assert "trainer.barebones: true: no checkpoint is written" in run.text
    assert names(tmp_path) == {"config.yaml"}
    cli("predict", *FIT, "--trainer.barebones=true", f"--data.predict={TINY}/prompts.jsonl")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--trainer.strategy=dpp", "trainer.strategy: 'dpp' cannot be used"),
        ("--trainer.strategy=fsdp", "trainer.strategy: 'fsdp' cannot be used"),
        ("--trainer.devices=0", "trainer.devices: '0' cannot be used"),
        ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches: 0 cannot be used"),
        ("--trainer.max_time=abc", "trainer.max_time: 'abc' cannot be used"),
        ("--trainer.callbacks=[{class_path: EarlyStopping, init_args: {monitor: val/loss, mode: foo}}]",
         "trainer.callbacks: EarlyStopping: `mode` can be min, max, got foo"),
        ("--trainer.callbacks=[{class_path: EarlyStopping, init_args: {monitor: nothing}}]",
         "trainer.callbacks: Early stopping conditioned on metric `nothing`"),
        ("--trainer.val_check_interval=100000", "trainer.val_check_interval: 100000 cannot be used"),
        ("--trainer.default_root_dir=s3://bucket/x", "trainer.default_root_dir: s3://bucket/x is an address"),
        ("--checkpoint.dirpath=gs://bucket/x", "checkpoint.dirpath: gs://bucket/x is an address"),
        ("--evaluation.folder=hf://x/y", "evaluation.folder: hf://x/y is an address"),
        ("--data.cache_dir=memory://x", "data.cache_dir: memory://x is an address"),
        ("--data.train=s3://bucket/chats.jsonl", "s3://bucket/chats.jsonl is an address"),
    ],
)  # fmt: skip
def test_impossible_options_are_one_line_naming_the_option(cli, tmp_path, option, message):
    refused = cli("fit", *FIT, option, code=1)
    (line,) = [line for line in refused.text.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in refused.text
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not list(tmp_path.glob("*:"))  # a folder named s3:


@pytest.mark.parametrize(
    "args",
    [
        ("init", "gs://bucket/x"),
        ("export", "--output_dir=hf://x/y", "--ckpt_path=x.ckpt"),
        ("chat", "--ckpt_path=s3://x/y.ckpt", f"--model.base={TINY}"),
        ("preview", "--html=s3://x/page.html", f"--data.tokenizer={TINY}"),
        ("preview", "--data.chat_template=file:///x/y.jinja", f"--data.tokenizer={TINY}"),
    ],
)
def test_every_command_refuses_a_url_as_a_path(cli, tmp_path, args):
    if args[0] == "export":
        torch.save({"state_dict": {}, "hyper_parameters": {"base": str(TINY)}}, tmp_path / "x.ckpt")
    refused = cli(*args, code=1)
    assert "is an address, and no path on this machine" in refused.text
    assert names(tmp_path) <= {"x.ckpt"}
