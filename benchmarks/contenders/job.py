"""A whole job: from the command to an adapter that others can load."""

import json
import sys
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Job:
    """Chats, model and settings; an optimiser step reads about as many chats in each library."""

    base: str
    train: str
    """JSON lines with ``messages``."""
    val: str
    out: str
    device: str
    max_length: int
    micro_batch: int
    """Chats of a padded micro-batch."""
    accumulate: int
    """Padded micro-batches of an optimiser step."""
    packed: int
    """Packed rows of an optimiser step of this package."""
    validations: int
    samples: int
    sample_tokens: int
    report: str = ""
    """Where the process writes its seconds by phase."""
    started: float = 0.0
    stage: str = "fit"
    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    lr: float = 2e-4

    @classmethod
    def ordered(cls) -> Self:
        """Return the job that this process was ordered to do."""
        return cls(**json.loads(sys.argv[1]))

    def trainer(self, steps: int) -> dict[str, object]:
        """Return the arguments of transformers' Trainer for one epoch of so many optimiser steps."""
        return {
            "output_dir": self.out,
            "per_device_train_batch_size": self.micro_batch,
            "per_device_eval_batch_size": self.micro_batch,
            "gradient_accumulation_steps": self.accumulate,
            "num_train_epochs": 1,
            "learning_rate": self.lr,
            "optim": "adamw_torch",
            "bf16": True,
            "use_cpu": self.device == "cpu",
            "eval_strategy": "steps",
            "eval_steps": max(1, steps // self.validations),
            "save_strategy": "epoch",
            "report_to": "none",
            "seed": 0,
        }

    def steps(self) -> int:
        """Return the optimiser steps of an epoch of padded batches."""
        with open(self.train, encoding="utf-8") as file:  # noqa: PTH123
            rows = sum(1 for _ in file)
        return -(-rows // (self.micro_batch * self.accumulate))
