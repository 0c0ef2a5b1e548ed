"""TRL's DPOTrainer with a PEFT adapter, whose reference is the base."""

import json
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoTokenizer

from contenders.clock import Clock
from contenders.hf_trainer import arguments
from contenders.task import TARGETS, Task


def run(task: Task, options: dict[str, Any], clock: Clock) -> None:
    """Train with ``options``: arguments of ``DPOConfig``."""

    class Trainer(trl.DPOTrainer):
        def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *more: Any) -> Tensor:
            clock.count(inputs["input_ids"], inputs["input_ids"])
            return super().training_step(model, inputs, *more)

    rows = Dataset.from_list([json.loads(line) for line in Path(task.rows).read_text().splitlines()])
    config = trl.DPOConfig(
        max_length=task.row_tokens,
        model_init_kwargs={"dtype": "bfloat16"},
        **arguments(task, packed=False) | options,
    )
    lora = {"r": task.r, "lora_alpha": task.alpha, "lora_dropout": task.dropout, "target_modules": list(TARGETS)}
    trainer = Trainer(
        model=task.base,
        args=config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(task.base),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
    )
    trainer.train()
    trainer.model.save_pretrained(task.out)
