"""What TRL and LLaMA-Factory have in common: the arguments of transformers' Trainer."""

from typing import Any

from contenders.task import Task


def arguments(task: Task, packed: bool) -> dict[str, Any]:
    """Return the arguments that make the Trainer do the task; the rest stays at the library's defaults."""
    return {
        "output_dir": task.out,
        "per_device_train_batch_size": 1 if packed else task.micro_batch,
        "gradient_accumulation_steps": 1 if packed else task.accumulate,
        "max_steps": task.steps,
        "learning_rate": task.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "optim": "adamw_torch",
        "bf16": True,
        "use_cpu": task.device == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "seed": task.seed,
    }
