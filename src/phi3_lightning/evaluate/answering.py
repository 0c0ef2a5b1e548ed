"""Generates the answers of base and tuned model to the same prompts, over all ranks."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import Progress

from phi3_lightning.batch.padding import prompt_batch
from phi3_lightning.evaluate.cases import Case
from phi3_lightning.evaluate.report import AnswerPair
from phi3_lightning.jsonl import PartialJsonl
from phi3_lightning.metrics import Answer, AnswerMetrics
from phi3_lightning.module import Phi3LoRAModule
from phi3_lightning.progress import LineCounter


class Answering:
    """Generates the answers of a module and of its base, with the ranks and precision of a Trainer."""

    def __init__(self, trainer: pl.Trainer, module: Phi3LoRAModule, tokenizer: Any, stop_ids: list[int]) -> None:
        self.trainer = trainer
        self.module = module
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.base_metrics = AnswerMetrics().to(module.device)
        self.tuned_metrics = AnswerMetrics().to(module.device)

    def run(self, cases: list[Case], batch_size: int, partial: PartialJsonl) -> list[AnswerPair]:
        """Answer this rank's share of cases, which are the same on every rank; all ranks call this.

        Which prompts share a batch follows from the prompts alone, so that greedy answers are the same to the bit for
        any number of ranks. ``partial`` receives each answer as soon as it is generated.
        """
        cases = sorted(cases, key=lambda case: (-len(case.prompt), case.document_id))
        batches = [cases[start : start + batch_size] for start in range(0, len(cases), batch_size)]
        own = batches[self.trainer.global_rank :: self.trainer.world_size]
        steps = -(-len(batches) // self.trainer.world_size)
        advance = _progress(self.trainer, steps)
        pairs: list[AnswerPair] = []
        for step in range(steps):
            batch = own[step] if step < len(own) else []  # FSDP2 needs the same number of calls on each rank
            for pair in self._answer(batch):
                partial.add(pair.content())
                pairs.append(pair)
            advance()
        return pairs

    def _answer(self, cases: list[Case]) -> list[AnswerPair]:
        rows, prompts = [case.document_id for case in cases], [case.prompt for case in cases]
        batch = prompt_batch(prompts, rows, self.stop_ids, device=self.module.device)
        with self.trainer.precision_plugin.predict_step_context():
            tuned = self._decode(cases, self.module.predict_step(batch, 0))
            with self.module.base_answers():
                base = self._decode(cases, self.module.predict_step(batch, 0))
        statistics = []
        for metrics, answers in ((self.base_metrics, base), (self.tuned_metrics, tuned)):
            by_name = {name: counts.tolist() for name, counts in metrics.update(answers).items()}
            statistics.append([{name: counts[i] for name, counts in by_name.items()} for i in range(len(cases))])
        texts = [self.tokenizer.decode(prompt) for prompt in prompts]
        return [AnswerPair(*columns) for columns in zip(rows, texts, base, tuned, *statistics, strict=True)]

    def _decode(self, cases: list[Case], generated: list[list[int]]) -> list[Answer]:
        answers = []
        for case, ids in zip(cases, generated, strict=True):
            finished = ids[-1] in self.stop_ids
            content = ids[:-1] if finished else ids
            text = self.tokenizer.decode(content, skip_special_tokens=True)
            reference = self.tokenizer.decode(case.reference, skip_special_tokens=True)
            answers.append(Answer(text, reference, len(content), finished))
        return answers


def live_progress(trainer: pl.Trainer) -> Progress | None:
    """Return the progress that Lightning draws on the terminal, where it draws one."""
    bar = trainer.progress_bar_callback
    return bar.progress if isinstance(bar, RichProgressBar) else None


def _progress(trainer: pl.Trainer, steps: int) -> Callable[[], None]:
    """A task in Lightning's rich progress bar, or lines where the Trainer has another bar."""
    bar = live_progress(trainer)
    if bar is not None:
        task = bar.add_task("Answering", total=steps)
        return lambda: bar.advance(task)
    if trainer.progress_bar_callback is None:
        return lambda: None
    return LineCounter("answering", "batches, base and tuned model", steps).advance
