"""TRL's SFTTrainer with a PEFT adapter."""

from typing import Any

import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from contenders.clock import Clock
from contenders.hf_trainer import arguments
from contenders.task import TARGETS, Task


def run(task: Task, options: dict[str, Any], clock: Clock) -> None:
    """Train with ``options``: arguments of ``SFTConfig``, and ``assistant_only``: whether others' tokens train too.

    Rows come tokenised; with ``labels`` TRL trains those, and without all tokens, as it does with messages by default.
    """
    chosen = dict(options)
    keys = ("input_ids", "labels") if chosen.pop("assistant_only") else ("input_ids",)
    rows = Dataset.from_list([{key: getattr(row, key) for key in keys} for row in task.read()])
    config = trl.SFTConfig(
        max_length=task.row_tokens,
        model_init_kwargs={"dtype": "bfloat16"},
        **arguments(task, packed=chosen.get("packing", False)) | chosen,
    )
    lora = {"r": task.r, "lora_alpha": task.alpha, "lora_dropout": task.dropout, "target_modules": list(TARGETS)}
    trainer = trl.SFTTrainer(
        model=task.base,
        args=config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(task.base),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
    )
    clock.watch(trainer.model)
    trainer.train()
    trainer.model.save_pretrained(task.out)
