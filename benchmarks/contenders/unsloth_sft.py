"""Unsloth's model under TRL's SFTTrainer, which importing it patches, as its notebooks have it."""

import os
from typing import Any

os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"

import unsloth  # noqa: I001  before what it patches
import trl
from datasets import Dataset
from transformers import AutoTokenizer

from contenders.clock import Clock
from contenders.hf_trainer import arguments
from contenders.task import TARGETS, Task

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What ``TARGETS`` are called in a model whose fused layers it has split."""


def run(task: Task, options: dict[str, Any], clock: Clock) -> None:
    """Train with ``options``: arguments of ``SFTConfig``; rows come tokenised, with labels."""
    chosen = {key: value for key, value in options.items() if key != "assistant_only"}
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        task.base, max_seq_length=task.row_tokens, dtype=None, load_in_4bit=False
    )
    fused = any(name.endswith("qkv_proj") for name, _ in model.named_modules())
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=task.r, lora_alpha=task.alpha, lora_dropout=task.dropout, random_state=task.seed,
        target_modules=list(TARGETS if fused else LAYERS), use_gradient_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in task.read()])
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(max_length=task.row_tokens, **arguments(task, packed=chosen.get("packing", False)) | chosen),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(task.base),
    )
    clock.watch(trainer.model)
    trainer.train()
    trainer.model.save_pretrained(task.out)
