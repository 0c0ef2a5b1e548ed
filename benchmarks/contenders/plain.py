"""A loop over a transformers model with a PEFT adapter, as tutorials write it: padded rows, exact mean of the step."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, set_seed

from contenders.clock import Clock
from contenders.task import IGNORE_INDEX, TARGETS, Row, Task


def padded(rows: list[Row], task: Task) -> dict[str, torch.Tensor]:
    ids = pad_sequence([torch.tensor(row.input_ids) for row in rows], batch_first=True, padding_value=task.pad)
    labels = pad_sequence([torch.tensor(row.labels) for row in rows], batch_first=True, padding_value=IGNORE_INDEX)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": (ids != task.pad).long()}
    return {name: tensor.to(task.device) for name, tensor in batch.items()}


def run(task: Task, options: dict[str, Any], clock: Clock) -> None:
    """Train; the option ``checkpointing`` recomputes each layer."""
    set_seed(task.seed)
    model = AutoModelForCausalLM.from_pretrained(task.base, dtype=torch.bfloat16).to(task.device)
    if options["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    lora = {"r": task.r, "lora_alpha": task.alpha, "lora_dropout": task.dropout, "target_modules": list(TARGETS)}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora)).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=task.lr, weight_decay=0.0)
    clock.watch(adapted)
    rows = task.read()
    per_step = task.micro_batch * task.accumulate
    for index in range(task.steps):
        start = index * per_step % len(rows)
        step = rows[start : start + per_step]
        batches = [padded(step[i : i + task.micro_batch], task) for i in range(0, len(step), task.micro_batch)]
        count = sum((batch["labels"][:, 1:] != IGNORE_INDEX).sum() for batch in batches)
        for batch in batches:
            with torch.autocast(task.device, dtype=torch.bfloat16):
                loss = adapted(**batch, use_cache=False, num_items_in_batch=count).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(task.out)
