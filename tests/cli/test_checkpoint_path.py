"""``--ckpt_path``: Lightning's words and paths mean the same in every command, and the base never replaces them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli.conftest import QUICK, TINY, Run, start
from phi3_lightning.checkpoint.io import read_checkpoint

DATA = (f"--data.predict={TINY}/prompts.jsonl", "--evaluation.rows=0")
FIT = ("--trainer.max_steps=6", "--trainer.val_check_interval=3", "--trainer.limit_val_batches=4")
COMMANDS = {
    "fit": (*QUICK, *FIT),
    "validate": (*QUICK, "--trainer.limit_val_batches=4"),
    "test": (*QUICK, *DATA),
    "predict": (*QUICK, *DATA),
    "chat": (f"--model.base={TINY}", "--prompt=Hi", "--model.generation.max_new_tokens=4"),
    "export": ("--output_dir=out", f"--model.base={TINY}", f"--data={{tokenizer: {TINY}}}"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a run whose best checkpoint is not its last."""
    folder = tmp_path_factory.mktemp("trained")
    run = start(folder, "fit", *COMMANDS["fit"], "--model.optimizer.lr=0.3", "--trainer.gradient_clip_val=1")
    assert run.wait() == 0, run.text
    return folder


def call(folder: Path, command: str, *args: str) -> Run:
    run = start(folder, command, *COMMANDS[command], *args)
    run.wait()
    return run


def loss(run: Run) -> float:
    return float(re.search(r"val/loss\s+│\s+([\d.]+)", run.text)[1])


def test_last_and_best_resolve_to_the_files_of_the_run(trained):
    base = loss(call(trained, "validate", "--run=other"))
    measured = {}
    for word in ("last", "best", "runs/phi3-lora/checkpoints/last.ckpt"):
        run = call(trained, "validate", f"--ckpt_path={word}")
        assert run.status == 0, run.text
        assert f"{'best' if word == 'best' else 'last'}.ckpt: taken" in run.text
        measured[word] = loss(run)
    assert measured["last"] == measured["runs/phi3-lora/checkpoints/last.ckpt"]
    assert len({base, measured["last"], measured["best"]}) == 3


@pytest.mark.parametrize("command", ["chat", "export"])
def test_chat_and_export_resolve_last_and_best_too(trained, tmp_path, command):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    run = call(tmp_path, command, "--ckpt_path=last")
    assert run.status == 0, run.text
    if command == "export":
        last, best = (
            read_checkpoint(tmp_path / f"runs/phi3-lora/checkpoints/{name}.ckpt") for name in ("last", "best")
        )
        name = "model.model.layers.0.self_attn.o_proj.lora_B.default.weight"
        exported = load_file(tmp_path / "out" / "adapter_model.safetensors").values()
        assert any(torch.equal(tensor, last["state_dict"][name]) for tensor in exported)
        assert not any(torch.equal(tensor, best["state_dict"][name]) for tensor in exported)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("word", ["nothing.ckpt", "best", ""])
def test_a_missing_checkpoint_ends_every_command(tmp_path, command, word):
    report = tmp_path / "runs/phi3-lora/test.json"
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps("of an earlier call"))
    run = call(tmp_path, command, f"--ckpt_path={word}")
    assert run.status == 1, run.text
    (line,) = [line for line in run.text.splitlines() if line.startswith("error: ")]
    assert "--ckpt_path" in line or "nothing.ckpt: there is no such checkpoint" in line
    assert "Traceback" not in run.text
    assert json.loads(report.read_text()) == "of an earlier call"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and "output" not in path.name] == ["test.json"]


@pytest.mark.parametrize("command", ["validate", "test", "predict", "chat", "export"])
def test_the_base_never_replaces_a_missing_last_checkpoint(tmp_path, command):
    run = call(tmp_path, command, "--ckpt_path=last")
    assert run.status == 1
    assert "error: --ckpt_path last: runs/phi3-lora/checkpoints/last.ckpt: there is no such checkpoint" in run.text


def test_fit_with_ckpt_path_last_starts_without_a_checkpoint(tmp_path):
    first = call(tmp_path, "fit", "--ckpt_path=last", "--trainer.max_steps=1")
    assert "no checkpoint yet, starting at step 0" in first.text
    assert "resuming after step 1" in call(tmp_path, "fit", "--ckpt_path=last", "--trainer.max_steps=2").text
    assert "nothing left to do" in call(tmp_path, "fit", "--ckpt_path=last", "--trainer.max_steps=2").text


def test_checkpoints_of_another_folder_are_found_by_every_command(tmp_path):
    place = "--checkpoint.dirpath=elsewhere"
    call(tmp_path, "fit", place, "--trainer.max_steps=1")
    assert "elsewhere/last.ckpt: resuming after step 1" in call(tmp_path, "fit", place, "--trainer.max_steps=2").text
    saved = "--config=runs/phi3-lora/config.yaml"
    for command in ("validate", "chat"):
        run = start(tmp_path, command, saved, *(("--prompt=Hi",) if command == "chat" else ()))
        run.wait()
        assert "elsewhere/last.ckpt: taken" in run.text


def test_a_run_folder_is_refused_with_its_checkpoints_named(trained):
    run = call(trained, "validate", "--ckpt_path=runs/phi3-lora")
    assert run.status == 1
    assert "give runs/phi3-lora/checkpoints/best.ckpt or runs/phi3-lora/checkpoints/last.ckpt" in run.text
