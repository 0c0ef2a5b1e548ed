"""Seconds, tokens and memory of optimiser steps, whoever takes them."""

import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from contenders.task import IGNORE_INDEX, Task


@dataclass(frozen=True)
class Step:
    """What one optimiser step took and read.

    Args:
        seconds: From the end of the step before to its own end; None for the first.
        processed: Tokens that went through the model, padding included.
        real: Tokens of chats among them.
        supervised: Tokens that are predicted and have a label.
    """

    seconds: float | None
    processed: int
    real: int
    supervised: int


class Clock:
    """Times each optimiser step and counts its tokens.

    A step ends where torch calls the hook after ``Optimizer.step``: loading, collating, the passes of all micro-batches
    and the update belong to it, in every trainer alike. Importing, loading the model and ``Task.warmup`` steps do not.
    """

    def __init__(self, task: Task) -> None:
        self.steps: list[Step] = []
        self.peak_bytes = 0
        self._task = task
        self._counts: list[Tensor] = []
        self._last: float | None = None
        self._hook = register_optimizer_step_post_hook(self._end_step)

    def watch(self, model: nn.Module) -> None:
        """Count what a transformers model is called with."""

        def count(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.count(kwargs["input_ids"], kwargs["labels"])

        model.register_forward_pre_hook(count, with_kwargs=True)

    def count(self, input_ids: Tensor, labels: Tensor) -> None:
        """Add a micro-batch; labels are unshifted, so that the first of a row is never predicted."""
        processed = torch.tensor(input_ids.numel(), device=input_ids.device)
        real = (input_ids != self._task.pad).sum()
        supervised = (labels[..., 1:] != IGNORE_INDEX).sum()
        self._counts.append(torch.stack([processed, real, supervised]))

    def _end_step(self, *_: Any) -> None:
        if len(self.steps) == self._task.steps:
            return
        if self._task.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds = None if self._last is None else now - self._last
        self._last = now
        self.steps.append(Step(seconds, *torch.stack(self._counts).sum(0).tolist()))
        self._counts = []
        if len(self.steps) == self._task.steps:
            self.peak_bytes = peak_bytes(self._task.device)
            self._hook.remove()

    def timed(self) -> list[Step]:
        """Return the steps after the warm-up."""
        return self.steps[self._task.warmup :]


def peak_bytes(device: str) -> int:
    """Return the most memory that this process has held: on the GPU, or else resident, from its start."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
