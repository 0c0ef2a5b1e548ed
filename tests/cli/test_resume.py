"""The table of docs/checkpoints.md: the effect of a changed option on a resumed run."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli.conftest import QUICK, REPOSITORY, TINY, start

TABLE = (REPOSITORY / "docs/checkpoints.md").read_text().split("## Changed options")[1].split("## Exactness")[0]

SLOW = pytest.mark.slow  # the same code path as another row
HONOURED = [
    pytest.param("model.optimizer.lr", "0.002", marks=SLOW),
    ("model.schedule", "{name: linear, warmup: 1}"),
    pytest.param("trainer.max_epochs", "3", marks=SLOW),
    ("trainer.accumulate_grad_batches", "2"),
    pytest.param("trainer.precision", "32-true", marks=SLOW),
    ("model.lora.lora_dropout", "0.3"),
    pytest.param("model.gradient_checkpointing", "full", marks=SLOW),
    pytest.param("data.num_workers", "1", marks=SLOW),
]
NEW_ORDER = "stopped within an epoch whose order cannot be continued"
REFUSED = [
    ("data.batch_size", "2", f"{NEW_ORDER}: data.batch_size is 2 and was 1"),
    pytest.param("data.max_length", "128", NEW_ORDER, marks=SLOW),
    pytest.param("data.packing", "false", NEW_ORDER, marks=SLOW),
    pytest.param("data.train", f"{TINY}/chats_val.jsonl", NEW_ORDER, marks=SLOW),
    pytest.param("model.lora.r", "8", "r is 8 and was 16", marks=SLOW),
    pytest.param("model.lora.lora_alpha", "8", "lora_alpha is 8", marks=SLOW),
    pytest.param("model.lora.use_rslora", "true", "use_rslora is True and was", marks=SLOW),
    ("model.lora.target_modules", "[o_proj]", "target_modules adapts o_proj in 4 layers and adapted"),
    ("model.base", "other", "belongs to another base model"),
    pytest.param("model.dtype", "float32", "belongs to another base model", marks=SLOW),
    ("data.tokenizer", "other", "another tokenizer"),
    ("data.chat_template", "own.jinja", "another template"),
]
START = (*QUICK, "--trainer.max_epochs=2", "--trainer.limit_val_batches=1")


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory) -> Path:
    """A run stopped after three of its steps, and other bases, tokenizers and templates to resume with."""
    folder = tmp_path_factory.mktemp("begun")
    begin = start(folder, "fit", *START, "--trainer.max_steps=3", "--run=bot")
    assert begin.wait() == 0, begin.text
    other = folder / "other"
    other.mkdir()
    for path in TINY.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    weights = bytearray((other / "model.safetensors").read_bytes())
    for low_byte in range(len(weights) - 600_000, len(weights), 2):  # of bfloat16 values: the last mantissa bits
        weights[low_byte] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    template = json.loads((TINY / "tokenizer_config.json").read_text())["chat_template"]
    (folder / "own.jinja").write_text(template + "{# other #}")
    return folder


def resume(stopped_run: Path, tmp_path: Path, key: str, value: str, *more: str):
    (tmp_path / "runs/bot/checkpoints").mkdir(parents=True)
    last = tmp_path / "runs/bot/checkpoints/last.ckpt"
    last.write_bytes((stopped_run / "runs/bot/checkpoints/last.ckpt").read_bytes())
    for name in ("other", "own.jinja"):
        (tmp_path / name).symlink_to(stopped_run / name)
    run = start(tmp_path, "fit", *START, "--trainer.max_steps=5", "--run=bot", f"--{key}={value}", *more)
    run.wait()
    return run, last


@pytest.mark.parametrize(("key", "value"), HONOURED)
def test_options_that_may_change_are_honoured(stopped_run, tmp_path, key, value):
    run, last = resume(stopped_run, tmp_path, key, value)
    assert run.status == 0, run.text
    assert "resuming after step 3" in run.text
    assert torch.load(last, weights_only=True)["global_step"] == 5
    row = next(line for line in TABLE.splitlines() if key.split(".")[-1] in line)
    assert "honoured" in row


@pytest.mark.parametrize(("key", "value", "message"), REFUSED)
def test_options_that_may_not_change_are_refused(stopped_run, tmp_path, key, value, message):
    more = (f"--data.tokenizer={TINY}",) if key == "model.base" else ()
    run, last = resume(stopped_run, tmp_path, key, value, *more)
    assert run.status == 1, run.text
    assert message in run.text
    assert "Traceback" not in run.text
    assert last.read_bytes() == (stopped_run / "runs/bot/checkpoints/last.ckpt").read_bytes()
    row = next(line for line in TABLE.splitlines() if re.search(rf"\b{key.split('.')[-1]}\b", line))
    assert "refused" in row


def test_on_mismatch_warn_accepts_a_difference(stopped_run, tmp_path):
    run, last = resume(stopped_run, tmp_path, "data.chat_template", "own.jinja", "--checkpoint.on_mismatch=warn")
    assert run.status == 0, run.text
    assert torch.load(last, weights_only=True)["global_step"] == 5


STOPPING = """[{class_path: EarlyStopping, init_args: {monitor: val/loss, min_delta: 100.0, patience: %s}}]"""
SHORT = (*QUICK, "--trainer.max_epochs=9", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1")


def test_early_stopping_follows_what_is_typed_now(cli, tmp_path):
    def steps(callbacks: str, *more: str) -> int:
        run = cli("fit", *SHORT, "--run=bot", f"--trainer.callbacks={callbacks}", *more)
        over = "nothing left to do" in run.text
        assert over == ("early stopping ended it" in run.text)
        done = torch.load(tmp_path / "runs/bot/checkpoints/last.ckpt", weights_only=True)["global_step"]
        return -done if over else done

    assert steps(STOPPING % 1) == 4
    assert steps(STOPPING % 1) == -4
    assert steps(STOPPING % 3) == 8
    assert steps(STOPPING % 2) == -8
    assert steps("[]", "--trainer.max_epochs=5") == 10


def test_each_start_has_its_own_max_time(cli, tmp_path):
    last = tmp_path / "runs/bot/checkpoints/last.ckpt"
    for steps in (2, 4):
        cli("fit", *SHORT, "--run=bot", f"--trainer.max_steps={steps}", "--trainer.max_time=00:01:00:00")
        saved = torch.load(last, weights_only=True)
        assert saved["global_step"] == steps
        saved["callbacks"]["Timer"]["time_elapsed"]["train"] = 7200.0
        torch.save(saved, last)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ended")
    run = start(folder, "fit", *SHORT, "--trainer.max_steps=1", "--run=bot")
    assert run.wait() == 0, run.text
    return folder


def rerun(finished_run: Path, *options: str, code: int) -> str:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if "output" not in path.name}
    run = start(finished_run, "fit", *SHORT, "--trainer.max_steps=1", "--run=bot", *options)
    assert run.wait() == code, run.text
    assert "Traceback" not in run.text
    assert before == {path: path.stat().st_mtime_ns for path in before}
    return run.text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.lora.r=4", "model.lora.r is 4 and was 16"),
        (f"--data.train={TINY}/chats_val.jsonl", "data.train is "),
        ("--seed_everything=7", "seed_everything is 7 and was 42"),
        ("--model.optimizer.class_path=torch.optim.SGD", "model.optimizer.class_path is torch.optim.SGD and was None"),
        pytest.param("--model.dtype=float32", "model.dtype is float32 and was bfloat16", marks=SLOW),
        pytest.param("--model.lora.target_modules=[o_proj]", "model.lora.target_modules is ", marks=SLOW),
        pytest.param("--data.max_length=128", "data.max_length is 128 and was 256", marks=SLOW),
    ],
)
def test_a_different_run_in_a_finished_folder_is_refused(finished_run, option, message):
    text = rerun(finished_run, option, code=1)
    (line,) = (line for line in text.splitlines() if line.startswith("error: "))
    assert message in line
    assert "another --run" in line


def test_a_finished_run_names_changed_options_without_effect(finished_run):
    assert "nothing left to do: trainer.max_steps 1 is reached" in rerun(finished_run, code=0)
    text = rerun(finished_run, "--model.optimizer.lr=0.002", "--data.num_workers=1", code=0)
    assert "model.optimizer.lr is 0.002 and was 0.01" in text
    assert "num_workers" not in text


AVERAGING = """[{class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.5}}]"""


def test_averaged_adapters_are_saved_resumed_and_exported(cli, tmp_path):
    averaged = (*SHORT, f"--trainer.callbacks={AVERAGING}", "--run=bot")
    cli("fit", *averaged, "--trainer.max_steps=3")
    assert "resuming after step 3" in cli("fit", *averaged, "--trainer.max_steps=5").text
    saved = torch.load(tmp_path / "runs/bot/checkpoints/last.ckpt", weights_only=True)
    averaged_state, current = saved["state_dict"], saved["current_model_state"]
    assert averaged_state.keys() == current.keys()
    assert all("lora_" in name for name in averaged_state)
    assert not all(torch.equal(averaged_state[name], current[name]) for name in averaged_state)
    last = str(tmp_path / "runs/bot/checkpoints/last.ckpt")
    found = cli("validate", *averaged, f"--ckpt_path={last}").text
    assert "val/loss" in found
    cli("export", f"--ckpt_path={last}", f"--model.base={TINY}", "--output_dir=exported")
    tensors = load_file(tmp_path / "exported/adapter_model.safetensors")
    sums = sorted(round(tensor.abs().sum().item(), 3) for tensor in tensors.values())
    assert sums == sorted(round(tensor.abs().sum().item(), 3) for tensor in averaged_state.values())


@pytest.mark.parametrize(
    ("callback", "strategy", "message"),
    [
        ("{class_path: StochasticWeightAveraging, init_args: {swa_lrs: 0.01}}", "auto", "use WeightAveraging"),
        (
            "{class_path: lightning.pytorch.callbacks.EMAWeightAveraging}",
            "phi3_lightning.FSDP2Strategy",
            "use trainer.",
        ),
    ],
)
def test_unsupported_averaging_is_refused_before_anything_is_written(cli, tmp_path, callback, strategy, message):
    strategy = strategy if strategy == "auto" else f'{{"class_path": "{strategy}"}}'
    run = cli("fit", *SHORT, f"--trainer.callbacks=[{callback}]", f"--trainer.strategy={strategy}", code=1)
    assert "error: trainer.callbacks: " in run.text
    assert message in run.text
    assert "Traceback" not in run.text
    assert not (tmp_path / "runs").exists()
