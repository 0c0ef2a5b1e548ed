"""This package's commands, fit and export."""

import sys

import lightning.pytorch as pl
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop

from contenders.job import Job
from contenders.phases import Phases
from contenders.task import TARGETS
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.callbacks import Samples
from phi3_lightning.cli import main


def fit(job: Job) -> list[str]:
    """Return the command that trains."""
    options = {
        "run": "job", "model.base": job.base, "model.base_id": "benchmarks/base", "data.train": job.train,
        "data.val": job.val, "data.cache_dir": f"{job.out}/cache", "data.max_length": job.max_length,
        "data.batch_size": 1, "model.lora.r": job.r, "model.lora.lora_alpha": job.alpha,
        "model.lora.lora_dropout": job.dropout, "model.lora.target_modules": f"[{','.join(TARGETS)}]",
        "model.optimizer.lr": job.lr, "monitor.samples": job.samples, "monitor.sample_tokens": job.sample_tokens,
        "monitor.base_drift": "false", "trainer.accelerator": "gpu" if job.device == "cuda" else "cpu",
        "trainer.devices": 1, "trainer.precision": "bf16-mixed", "trainer.max_epochs": 1,
        "trainer.accumulate_grad_batches": job.packed, "trainer.val_check_interval": 1 / job.validations,
        "trainer.num_sanity_val_steps": 0, "trainer.default_root_dir": job.out,
    }  # fmt: skip
    return ["fit", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def export(job: Job) -> list[str]:
    """Return the command that writes the adapter."""
    return ["export", "--run", "job", "--trainer.default_root_dir", job.out, "--output_dir", f"{job.out}/adapter"]


if __name__ == "__main__":
    job = Job.ordered()
    phases = Phases("start" if job.stage == "fit" else "export", job.started)
    if job.stage == "fit":
        phases.watch(ChatDataModule, "prepare_data", "tokenising")
        phases.watch(ChatDataModule, "setup", "tokenising")
        phases.watch(Phi3LoRAModule, "configure_model", "loading")
        phases.watch(pl.Trainer, "fit", "training")
        phases.watch(_EvaluationLoop, "run", "validation")
        phases.watch(Samples, "_answer", "samples")
        phases.watch(pl.Trainer, "save_checkpoint", "checkpoint")
    sys.argv = ["phi3-lightning", *(fit(job) if job.stage == "fit" else export(job))]
    main()
    phases.write(job.report)
