"""The table of docs/checkpoints.md: what a changed option does to a run that goes on."""

import json
import re
from pathlib import Path

import pytest
import torch

from cli.conftest import QUICK, REPOSITORY, TINY, start

TABLE = (REPOSITORY / "docs/checkpoints.md").read_text().split("## What a changed option")[1].split("## Exactness")[0]

SLOW = pytest.mark.slow  # the same way through the house as another row
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
    ("data.batch_size", "2", NEW_ORDER),
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
def begun(tmp_path_factory) -> Path:
    """A run that was stopped after three of its many steps, and other bases, tokenizers and templates to go on with."""
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
    for low_byte in range(len(weights) - 600_000, len(weights), 2):  # of bfloat16 values: the last bits of the mantissa
        weights[low_byte] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    template = json.loads((TINY / "tokenizer_config.json").read_text())["chat_template"]
    (folder / "own.jinja").write_text(template + "{# other #}")
    return folder


def go_on(begun: Path, tmp_path: Path, key: str, value: str, *more: str):
    (tmp_path / "runs/bot/checkpoints").mkdir(parents=True)
    last = tmp_path / "runs/bot/checkpoints/last.ckpt"
    last.write_bytes((begun / "runs/bot/checkpoints/last.ckpt").read_bytes())
    for name in ("other", "own.jinja"):
        (tmp_path / name).symlink_to(begun / name)
    run = start(tmp_path, "fit", *START, "--trainer.max_steps=5", "--run=bot", f"--{key}={value}", *more)
    run.wait()
    return run, last


@pytest.mark.parametrize(("key", "value"), HONOURED)
def test_what_is_honoured(begun, tmp_path, key, value):
    run, last = go_on(begun, tmp_path, key, value)
    assert run.status == 0, run.text
    assert "going on after step 3" in run.text
    assert torch.load(last, weights_only=True)["global_step"] == 5
    row = next(line for line in TABLE.splitlines() if key.split(".")[-1] in line)
    assert "honoured" in row


@pytest.mark.parametrize(("key", "value", "told"), REFUSED)
def test_what_is_refused(begun, tmp_path, key, value, told):
    more = (f"--data.tokenizer={TINY}",) if key == "model.base" else ()
    run, last = go_on(begun, tmp_path, key, value, *more)
    assert run.status == 1, run.text
    assert told in run.text
    assert "Traceback" not in run.text
    assert last.read_bytes() == (begun / "runs/bot/checkpoints/last.ckpt").read_bytes()
    row = next(line for line in TABLE.splitlines() if re.search(rf"\b{key.split('.')[-1]}\b", line))
    assert "refused" in row


def test_a_difference_can_be_taken_on_purpose(begun, tmp_path):
    run, last = go_on(begun, tmp_path, "data.chat_template", "own.jinja", "--checkpoint.on_mismatch=warn")
    assert run.status == 0, run.text
    assert torch.load(last, weights_only=True)["global_step"] == 5
