"""The scripts of examples/, each run unchanged on the package's tiny model."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from cli.conftest import REPOSITORY, TINY
from cli.conftest import cli as cli

FEW = f"--chats={TINY}/chats_val.jsonl"
MANNER = re.compile("in from the dark|lantern lit")
"""Words of the quickstart's bookshop; a few steps teach some of them."""
NAMES = sorted(path.stem for path in (REPOSITORY / "examples").glob("*.py"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a script in a folder of its own and return what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "src").symlink_to(REPOSITORY / "src")  # where a checkout has the tiny model

    def run(name: str, *args: str) -> str:
        script = str(REPOSITORY / f"examples/{name}.py")
        monkeypatch.setattr(sys, "argv", [script, *args])
        runpy.run_path(script, run_name="__main__")
        return capfd.readouterr().out

    return run


def test_each_is_listed_in_the_guide_and_says_how_to_run_it():
    listed = (REPOSITORY / "docs/recipes.md").read_text()
    for name in NAMES:
        assert f"../examples/{name}.py" in listed
        assert f"python examples/{name}.py" in (REPOSITORY / f"examples/{name}.py").read_text()


def test_loralib_walkthrough(run, tmp_path):
    text = run("loralib_walkthrough", "--steps=3")
    assert "qkv_proj: a loralib.MergedLinear, enable_lora=[True, False, True]" in text
    assert "slices of (192, 64, 64) rows" in text
    assert "frozen:   every weight is as it was, to the bit" in text
    assert re.search(r"refused:  .*lora\.pt.*unexpected \S+o_proj\.lora_A", text)
    state = torch.load(tmp_path / "lora.pt", weights_only=True)
    assert len(state) == 4 * 2 * 2  # four blocks, A and B of two layers
    assert any(tensor.abs().sum() > 0 for name, tensor in state.items() if name.endswith("lora_B"))


def test_module_in_a_foreign_cli(run, tmp_path):
    (tmp_path / "notes.txt").write_text("\n\n".join(f"Note {number} is about the harbour." for number in range(8)))
    run(
        "module_in_a_foreign_cli", "fit", f"--model.base={TINY}", f"--data.tokenizer={TINY}", "--data.file=notes.txt",
        "--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.logger=false", "--model.optimizer.lr=0.01",
        "--trainer.enable_progress_bar=false", "--trainer.default_root_dir=out",
    )  # fmt: skip
    [checkpoint] = (tmp_path / "out").rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    assert state["global_step"] == 8
    assert all("lora_" in name for name in state["state_dict"])


def test_data_under_a_foreign_module(run):
    one, four = (run("data_under_a_foreign_module", f"--epochs={epochs}", FEW) for epochs in (1, 4))
    rows = re.search(r"38 chats in (\d+) rows; loss ([\d.]+)", one)  # a twentieth of 40 is held out
    assert int(rows[1]) < 38
    assert float(re.search(r"loss ([\d.]+)", four)[1]) < float(rows[2]) - 0.1


def test_checkpoints_of_any_module(run, tmp_path):
    text = run("checkpoints_of_any_module")
    assert "['head.bias', 'head.weight']" in text
    assert "the same, to the bit, as never stopped: True" in text
    size = (tmp_path / "runs/any-module/stopped/last.ckpt").stat().st_size
    assert size < 512 * 512 * 4 / 10


def test_adapter_without_trainer(run, tmp_path):
    text = run("adapter_without_trainer", "--steps=8")
    losses = [float(loss) for loss in re.findall(r"step \d: loss ([\d.]+)", text)]
    assert losses[-1] < losses[0] - 0.5
    assert float(re.search(r"base alone: ([\d.]+)", text)[1]) == pytest.approx(losses[0], abs=1e-3)
    # float32 through four blocks: roundings of sums of a few hundred terms, on logits of about 10
    assert float(re.search(r"differ by ([\d.e+-]+)", text)[1]) < 1e-4
    assert json.loads((tmp_path / "my-adapter/adapter_config.json").read_text())["target_modules"] == ["qkv_proj"]


def test_many_adapters(run, tmp_path):
    text = run("many_adapters", FEW, "--steps=3", "--rank", "2", "4", "--lr", "1e-5", "1e-2")
    lines = re.findall(r"^([\d.]+)  (\S+)  (\S+)$", text, re.MULTILINE)
    names = {"r2-lr1e-05", "r2-lr0.01", "r4-lr1e-05", "r4-lr0.01"}
    assert {name for _, name, _ in lines} == names
    assert {name for _, name, _ in lines[:2]} == {"r2-lr0.01", "r4-lr0.01"}  # the lowest losses come first
    for loss, name, checkpoint in lines:
        state = torch.load(tmp_path / checkpoint, weights_only=True)
        assert state["hyper_parameters"]["lora"]["r"] == int(name[1])
        events = EventAccumulator(str(tmp_path / "search" / name)).Reload()
        assert events.Scalars("val/loss")[-1].value == pytest.approx(float(loss), abs=1e-4)
        assert "_hparams_/session_start_info" in events.summary_metadata


def test_many_adapters_leave_one_base_as_it_was(run, monkeypatch):
    from phi3_lightning.model import base

    loaded = []
    load = base.load
    monkeypatch.setattr(base, "load", lambda *args, **kwargs: loaded.append(load(*args, **kwargs)) or loaded[-1])
    run("many_adapters", FEW, "--steps=2", "--rank", "2", "4", "--lr", "1e-2")
    [one] = loaded
    before = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).state_dict()
    assert one.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.state_dict().items())


@pytest.mark.slow
def test_serve_an_export(run, cli, tmp_path):
    cli(
        "fit", f"--config={REPOSITORY}/configs/quickstart.yaml", "--trainer.max_steps=100", "--run=bot",
        "--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=1",
    )  # fmt: skip
    cli("export", "--run=bot", "--output_dir=my-bot", "--model.base_id=tiny/phi3")
    cli("export", "--run=bot", "--output_dir=my-bot-full", "--model.base_id=tiny/phi3", "--merge")
    question = "Who knows the most about letters?"
    adapter = run("serve_an_export", "my-bot", question, "--base", str(TINY))
    merged = run("serve_an_export", "my-bot-full", question)
    base = run("serve_an_export", str(TINY), question)
    for answer in (adapter, merged):
        assert MANNER.search(answer)
        assert "<|" not in answer
    assert not MANNER.search(base)


def test_search(run, tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="no Optuna: the extra search is not installed")
    from phi3_lightning.model import base

    loaded, load = [], base.load
    monkeypatch.setattr(base, "load", lambda *args, **kwargs: loaded.append(load(*args, **kwargs)) or loaded[-1])
    text = run("search", FEW, "--trials=6", "--steps=4", "--validations=2", "--lr", "1e-6", "1e-1")
    assert "6 trials" in text
    pruned = 0
    for number in range(6):
        folder = tmp_path / f"search/trial-{number:03d}"
        state = torch.load(folder / "last.ckpt", weights_only=True)
        pruned += state["global_step"] < 4
        assert all("lora_" in name for name in state["state_dict"])
        events = EventAccumulator(str(folder)).Reload()
        assert {"val/loss", "steps"} <= set(events.Tags()["scalars"])
    assert f"{pruned} of them pruned" in text
    assert pruned >= 1
    best = re.search(r"best: ([\d.]+)  .*  (\S+)$", text, re.MULTILINE)
    assert (tmp_path / best[2] / "best.ckpt").is_file()
    [one] = loaded
    before = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.state_dict().items())
