"""A run on pairs from the command line, and the uses of its checkpoint after the adapter it began with is deleted."""

import json
from pathlib import Path

import pytest
import torch

from cli.conftest import QUICK, start

CONFIG = "--config=runs/dpo/config.yaml"
ROWS = [
    {"prompt": f"Is it {hour} o'clock?", "chosen": "Yes. Keep your lantern lit.", "rejected": "No."}
    for hour in range(1, 9)
]
METRICS = {"preference_accuracy", "ranking_accuracy", "reward_margin", "chosen_logp", "rejected_logp"}


def command(folder: Path, *args: str) -> str:
    run = start(folder, *args)
    assert run.wait() == 0, run.text
    return run.text


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of a run of dpo, whose first adapter is deleted."""
    folder = tmp_path_factory.mktemp("dpo")
    command(folder, "fit", *QUICK, "--run=sft", "--trainer.max_steps=2")
    sft = (folder / "runs/sft/checkpoints/last.ckpt").rename(folder / "sft.ckpt")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pairs = (f"--data.train={folder}/pairs.jsonl", f"--data.val={folder}/pairs.jsonl")
    options = (*QUICK, *pairs, "--run=dpo", "--model.objective.name=dpo", f"--model.lora.init_from={sft}")
    monitor = ("--checkpoint.monitor=val/ranking_accuracy", "--data.packing=false", "--trainer.val_check_interval=2")
    command(folder, "fit", *options, *monitor, "--trainer.max_steps=4")
    sft.unlink()
    return folder


def test_the_best_checkpoint_ranks_best(folder):
    best = torch.load(folder / "runs/dpo/checkpoints/best.ckpt", weights_only=True)
    assert best["phi3_lightning"]["objective"] == "dpo"
    assert set(best["reference"]) == set(best["state_dict"])


def test_validation_measures_against_the_reference_of_the_checkpoint(folder):
    text = command(folder, "validate", CONFIG)
    assert all(f"val/{name}" in text for name in METRICS)


def test_the_report_ranks_by_base_and_tuned_model(folder):
    command(folder, "test", CONFIG, "--evaluation.rows=2", "--evaluation.resamples=100")
    content = json.loads((folder / "runs/dpo/test.json").read_text(encoding="utf-8"))
    assert content["metrics"]["ranking_accuracy"]["rows"] == len(ROWS)
    assert len(content["answers"]) == 2


def test_it_answers(folder):
    assert "best.ckpt: taken" in command(folder, "chat", CONFIG, "--prompt=Is it 3 o'clock?")


def test_its_adapter_is_exported(folder):
    command(folder, "export", CONFIG, "--output_dir=out")
    assert (folder / "out/certificate.json").is_file()


def test_the_same_command_resumes(folder):
    assert "resuming after step 4" in command(folder, "fit", CONFIG, "--trainer.max_steps=5")
