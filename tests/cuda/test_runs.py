"""Whole runs on a GPU: the tiny model learns under every precision, strategy and backend, as on a CPU."""

import re
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch

import synthetic
from cli.conftest import REPOSITORY, TINY, start
from cuda.conftest import DEVICE, DRY
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.callbacks import OutOfMemory

STEPS = 2 if DRY else 60
FIT = (
    "fit", f"--config={REPOSITORY}/configs/quickstart.yaml", f"--trainer.accelerator={DEVICE}", f"--model.base={TINY}",
    f"--data.train={TINY}/chats_train.jsonl", f"--data.val={TINY}/chats_val.jsonl",
    f"--data.predict={TINY}/prompts.jsonl", f"--trainer.max_steps={STEPS}",
    # dropout on a CPU cannot be compiled
    *(["--trainer.val_check_interval=1", "--model.lora.lora_dropout=0"] if DRY else []),
)  # fmt: skip
CASES = {
    "bf16-mixed": (),
    "bf16-true": ("--trainer.precision=bf16-true",),
    "16-mixed": ("--trainer.precision=16-mixed", "--model.dtype=float16"),
    "32-true": ("--trainer.precision=32-true", "--model.dtype=float32"),
    "compiled": ("--model.torch_compile=layers",),
    "compiled, checkpointing": ("--model.torch_compile=layers", "--model.gradient_checkpointing=full"),
    "selective": ("--model.gradient_checkpointing=selective",),
    "every second layer": ("--model.gradient_checkpointing=2",),
    "offload": ("--model.gradient_checkpointing=offload",),
    "what fits": ("--model.gradient_checkpointing=auto", "--data.max_tokens_per_batch=auto"),
    "loralib": ("--model.lora.backend=loralib", "--model.torch_compile=layers"),
    "dora, compiled": ("--model.lora.use_dora=true", "--model.torch_compile=layers"),
    "dora from the data": ("--model.lora.use_dora=true", "--model.lora.init_lora_weights=eva"),
    "NEFTune": ("--model.neftune_noise_alpha=5",),
    "ddp by NCCL": ("--trainer.strategy=ddp",),
    "FSDP2 by NCCL": (f"--config={REPOSITORY}/configs/overlays/fsdp2.yaml", "--trainer.devices=1"),
    "FSDP2, compiled": (
        f"--config={REPOSITORY}/configs/overlays/fsdp2.yaml", "--trainer.devices=1", "--model.torch_compile=layers",
    ),
    "FSDP2 by NCCL, bf16-true": (
        f"--config={REPOSITORY}/configs/overlays/fsdp2.yaml", "--trainer.devices=1", "--trainer.precision=bf16-true",
    ),
}  # fmt: skip
NEEDS_A_GPU = {"16-mixed", "offload", "dora, compiled"}  # the last breaks the single graph of the stand-in
QUANTISED = {
    "nf4": ("--model.quantization=nf4", f"--model.optimizer.name={'adamw' if DRY else 'paged_adamw_8bit'}"),
    "nf4, loralib": ("--model.quantization=nf4", "--model.lora.backend=loralib"),
    "nf4, compiled": ("--model.quantization=nf4", "--model.torch_compile=layers"),
    "int8": ("--model.quantization=int8",),
}


@pytest.fixture
def cli(tmp_path):
    """Run each command in a new process: one forked from this one could not use the GPU."""

    def run(*args: str) -> str:
        if DRY:
            forked = start(tmp_path, *args)
            assert forked.wait() == 0, forked.text
            return forked.text
        command = [sys.executable, REPOSITORY / "cli.py", *args]
        finished = subprocess.run(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert finished.returncode == 0, finished.stdout
        return finished.stdout

    return run


def held_out(text: str) -> tuple[float, float]:
    """The loss at the start of a run and at its end."""
    first, last = re.search(r"val/loss *│ *([\d.]+) │ *([\d.]+)", text).groups()
    return float(first), float(last)


def learns(text: str) -> None:
    first, last = held_out(text)
    assert DRY or last < first / 2, text


@pytest.mark.parametrize("case", CASES)
def test_the_tiny_model_learns(cli, case):
    if DRY and case in NEEDS_A_GPU:
        pytest.skip("needs a GPU")
    learns(cli(*FIT, *CASES[case]))


@pytest.mark.parametrize("case", QUANTISED)
def test_a_quantised_base_learns(cli, case):
    pytest.importorskip("bitsandbytes")
    learns(cli(*FIT, *QUANTISED[case]))


def test_a_run_resumes_and_its_checkpoint_works_on_a_cpu(cli):
    first, middle = held_out(cli(*FIT, f"--trainer.max_steps={1 if DRY else 27}"))  # an epoch
    _, last = held_out(cli(*FIT))
    assert DRY or (last < middle < first and last < first / 2)
    quick = f"--config={REPOSITORY}/configs/quickstart.yaml"
    answers = [
        cli("chat", quick, f"--model.base={TINY}", "--prompt=Hello", f"--trainer.accelerator={device}")
        for device in (DEVICE, "cpu")
    ]
    assert all(answer.strip() for answer in answers)


@pytest.mark.skipif(DRY, reason="the memory of a CPU has no limit to set")
def test_running_out_of_memory_names_the_batch(tmp_path):
    base = synthetic.save_tiny(tmp_path / "base", hidden_size=256, intermediate_size=1024, max_position_embeddings=2048)
    rows = [[synthetic.document(2000, 1000, seed)] for seed in range(16)]
    loader = synthetic.loader([synthetic.batch_of(rows)])
    trainer = pl.Trainer(
        accelerator="cuda", devices=1, max_steps=1, logger=False, callbacks=[OutOfMemory()], default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    share = 2e8 / torch.cuda.get_device_properties(0).total_memory  # gate and up projection of a layer alone are 262 MB
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        with pytest.raises(torch.OutOfMemoryError) as error:
            trainer.fit(Phi3LoRAModule(base, dtype="float32", gradient_checkpointing="none"), loader)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert error.value.__notes__[0].startswith("memory ran out in training batch 0")
    assert any("model.gradient_checkpointing: full" in note for note in error.value.__notes__)
