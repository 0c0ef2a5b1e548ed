"""Base and tuned model answer the same prompts, over all ranks."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import Progress

from phi3_lightning.batch.padding import prompt_batch
from phi3_lightning.evaluate.cases import Case, Tokenizer
from phi3_lightning.evaluate.report import Answered
from phi3_lightning.jsonl import PartialJsonl
from phi3_lightning.metrics import Answer, AnswerMetrics
from phi3_lightning.module import Phi3LoRAModule

LINE_SECONDS = 10.0
"""Least time between two lines about progress where there is no terminal."""


class Answering:
    """Lets a module answer, and its base.

    Args:
        trainer: Knows ranks and precision.
        module: The module.
        tokenizer: Turns ids into text.
        stop_ids: The tokens that end an answer.
    """

    def __init__(self, trainer: pl.Trainer, module: Phi3LoRAModule, tokenizer: Tokenizer, stop_ids: list[int]) -> None:
        self.trainer = trainer
        self.module = module
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.base_metrics = AnswerMetrics().to(module.device)
        self.tuned_metrics = AnswerMetrics().to(module.device)

    def run(self, chosen: list[Case], batch_size: int, partial: PartialJsonl) -> list[Answered]:
        """Answer this rank's share; all ranks call it with the same cases.

        Which prompts share a batch follows from the prompts alone, so that greedy answers are the same to the bit for
        any number of ranks.

        Args:
            chosen: What is asked.
            batch_size: Prompts that are answered together.
            partial: Keeps each answer as soon as it is there.
        """
        order = sorted(chosen, key=lambda case: (-len(case.prompt), case.document_id))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        own = batches[self.trainer.global_rank :: self.trainer.world_size]
        steps = -(-len(batches) // self.trainer.world_size)
        answered: list[Answered] = []
        with _progress(self.trainer, steps) as advance:
            for step in range(steps):
                part = own[step] if step < len(own) else []  # FSDP2 wants as many calls on each rank
                for found in self._batch(part):
                    partial.add(found.content())
                    answered.append(found)
                advance()
        return answered

    def _batch(self, part: list[Case]) -> list[Answered]:
        rows, prompts = [case.document_id for case in part], [case.prompt for case in part]
        batch = prompt_batch(prompts, rows, self.stop_ids, device=self.module.device)
        with self.trainer.precision_plugin.predict_step_context():
            tuned = self._answers(part, self.module.predict_step(batch, 0))
            with self.module.base_answers():
                base = self._answers(part, self.module.predict_step(batch, 0))
        statistics = []
        for metrics, answers in ((self.base_metrics, base), (self.tuned_metrics, tuned)):
            found = {name: counts.tolist() for name, counts in metrics.update(answers).items()}
            statistics.append([{name: counts[index] for name, counts in found.items()} for index in range(len(part))])
        texts = [self.tokenizer.decode(prompt) for prompt in prompts]
        return [Answered(*columns) for columns in zip(rows, texts, base, tuned, *statistics, strict=True)]

    def _answers(self, part: list[Case], generated: list[list[int]]) -> list[Answer]:
        answers = []
        for case, ids in zip(part, generated, strict=True):
            finished = ids[-1] in self.stop_ids
            content = ids[:-1] if finished else ids
            text, reference = (
                self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (content, case.reference)
            )
            answers.append(Answer(text, reference, len(content), finished))
        return answers


def live_progress(trainer: pl.Trainer) -> Progress | None:
    """Return the progress that Lightning draws on the terminal, where it draws one.

    Args:
        trainer: Knows its progress bar.
    """
    bar = trainer.progress_bar_callback
    return bar.progress if isinstance(bar, RichProgressBar) else None


@contextmanager
def _progress(trainer: pl.Trainer, steps: int) -> Iterator[Callable[[], None]]:
    """A task in Lightning's rich progress bar where there is one, else a plain line now and then."""
    progress = live_progress(trainer)
    if progress is not None:
        task = progress.add_task("Answering", total=steps)
        yield lambda: progress.advance(task)
        return
    done, said = 0, time.monotonic()

    def line() -> None:
        nonlocal done, said
        done += 1
        if trainer.progress_bar_callback is not None and (done == steps or time.monotonic() - said > LINE_SECONDS):
            said = time.monotonic()
            rank_zero_info(f"answering: {done} of {steps} batches, base and tuned model")

    yield line
