"""This package."""

from pathlib import Path
from typing import Any

from phi3_lightning import ChatDataModule, Phi3LoRAModule  # before Lightning, whose import allocates without huge pages

# isort: split
import lightning.pytorch as pl

from contenders.clock import Clock
from contenders.task import TARGETS, Task
from phi3_lightning.batch import Batch
from phi3_lightning.export import adapter_files


class Count(pl.Callback):
    """Tells the clock what each batch holds; of pairs it has a task's number, whose prompts may be computed twice."""

    def __init__(self, clock: Clock, pairs: int, share_prompts: bool) -> None:
        self.clock = clock
        self.pairs = pairs
        self.share_prompts = share_prompts

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.clock.count(batch["input_ids"], batch["labels"])
        if "shared_lengths" in batch:
            documents = sum(map(len, batch["shared_lengths"]))
            if documents != 2 * self.pairs:
                raise RuntimeError(f"a batch holds {documents} answers, and {2 * self.pairs} are a step")
            if not self.share_prompts:
                batch["shared_lengths"] = [[0] * len(row) for row in batch["shared_lengths"]]


def run(task: Task, options: dict[str, Any], clock: Clock) -> None:
    """Train with ``options``: arguments of the module (``model``), the data module (``data``) and the Trainer.

    With ``share_prompts`` false, the prompt of a pair is computed for each of its answers.
    """
    pl.seed_everything(task.seed)
    rows = {"train": task.rows, "format": "tokens", "max_length": task.row_tokens, "packing": True, "batch_size": 1}
    data = ChatDataModule(
        tokenizer=task.base,
        num_workers=0,
        seed=task.seed,
        val_fraction=0.0,
        cache_dir=task.out,
        **rows | options.get("data", {}),
    )
    module = Phi3LoRAModule(
        task.base,
        lora={"r": task.r, "lora_alpha": task.alpha, "lora_dropout": task.dropout, "target_modules": list(TARGETS)},
        optimizer={"lr": task.lr},
        schedule={"name": "constant", "warmup": 0},
        **options.get("model", {}),
    )
    plain = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator=task.device,
        devices=1,
        precision="bf16-mixed",
        max_epochs=-1,
        max_steps=task.steps,
        default_root_dir=task.out,
        callbacks=[Count(clock, task.micro_batch, options.get("share_prompts", True))],
        **plain | options.get("trainer", {}),
    )
    trainer.fit(module, data)
    folder = Path(task.out)
    adapter_files.write_peft(module.adapter.to_peft(), task.base, None, folder)
