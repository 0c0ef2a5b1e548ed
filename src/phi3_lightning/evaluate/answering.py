"""Generates and scores answers of a module, over all ranks."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import Progress

from phi3_lightning.batch.padding import prompt_batch
from phi3_lightning.contracts import data_module, origins
from phi3_lightning.distributed.collectives import all_gather_object
from phi3_lightning.errors import ConfigError
from phi3_lightning.evaluate.cases import Case, stop_ids
from phi3_lightning.metrics import Answer
from phi3_lightning.metrics.answers import Score
from phi3_lightning.module import Phi3LoRAModule
from phi3_lightning.progress import LineCounter


class ScoredAnswer(NamedTuple):
    """An answer, and the statistics of each score of it."""

    answer: Answer
    statistics: Mapping[str, list[float]]


class Answering:
    """Generates and scores the answers of a module to cases, with the ranks and precision of a Trainer.

    Which prompts share a batch follows from the prompts alone, and each batch draws its own random numbers, so that
    answers are the same to the bit for any number of ranks. What torch draws afterwards is as if nothing had been
    generated.

    Args:
        stage: What the cases are of, for their rows.
        cases: The same on every rank.
        scores: How answers are scored.
        rows: The rows of the cases, for the user's own scores; empty where there are none.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: Phi3LoRAModule,
        stage: Literal["validate", "test"],
        cases: Sequence[Case],
        scores: Mapping[str, Score],
        rows: Mapping[int, Mapping[str, Any]],
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.stage: Literal["validate", "test"] = stage
        self.cases = sorted(cases, key=lambda case: (-len(case.prompt), case.document_id))
        self.scores = scores
        self.rows = rows
        self.tokenizer = data_module(trainer).tokenizer
        self.stop_ids = stop_ids(cases, self.tokenizer)
        self._seed = 0
        self._failure: str | None = None

    def batches(self, batch_size: int) -> Iterator[list[Case]]:
        """Yield this rank's share of the cases; all ranks call this, and get the same number of batches.

        Raises:
            ConfigError: On every rank, if one of the user's metrics has failed on any.
        """
        starts = range(0, len(self.cases), batch_size)
        ranks = self.trainer.world_size
        for first in range(0, len(starts), ranks):
            self._seed = first + self.trainer.global_rank
            # past the end: FSDP2 needs the same number of calls on each rank
            start = starts[self._seed] if self._seed < len(starts) else len(self.cases)
            yield self.cases[start : start + batch_size]
            failures = [each for each in all_gather_object(self.trainer, self._failure) if each is not None]
            if failures:
                raise ConfigError(failures[0])

    def answer(self, cases: list[Case]) -> list[ScoredAnswer]:
        """Answer cases by the module as it is, and score the answers; all ranks call this."""
        prompts, document_ids = [case.prompt for case in cases], [case.document_id for case in cases]
        batch = prompt_batch(prompts, document_ids, self.stop_ids, device=self.module.device)
        devices = [self.module.device] if self.module.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self._seed)
            generated = self.module.predict_step(batch, 0)
        answers = [self._decode(case, ids) for case, ids in zip(cases, generated, strict=True)]
        return [ScoredAnswer(answer, self._count(case, answer)) for case, answer in zip(cases, answers, strict=True)]

    def _decode(self, case: Case, ids: list[int]) -> Answer:
        finished = ids[-1] in self.stop_ids
        content = ids[:-1] if finished else ids
        text = self.tokenizer.decode(content, skip_special_tokens=True)
        reference = self.tokenizer.decode(case.reference, skip_special_tokens=True)
        return Answer(text, reference, len(content), finished, self.rows.get(case.document_id, {}))

    def _count(self, case: Case, answer: Answer) -> dict[str, list[float]]:
        try:
            return {name: score.count(answer) for name, score in self.scores.items()}
        except ConfigError as error:  # of a user's metric
            if self.trainer.world_size == 1:
                raise ConfigError(self._named(error, case)) from error.__cause__
            self._failure = self._failure or self._named(error, case)
            return {}

    def _named(self, error: ConfigError, case: Case) -> str:
        [origin] = origins(data_module(self.trainer), self.stage, [case.document_id])
        return f"{error}; the row is {origin.place}"


def live_progress(trainer: pl.Trainer) -> Progress | None:
    """Return the progress that Lightning draws on the terminal, where it draws one."""
    bar = trainer.progress_bar_callback
    return bar.progress if isinstance(bar, RichProgressBar) else None


@contextmanager
def answering_progress(
    trainer: pl.Trainer, rows: int, batch_size: int, what: str, *, last_line: bool
) -> Iterator[Callable[[], None]]:
    """Yield what counts a batch, in Lightning's rich progress bar or by lines where the Trainer has another bar.

    Args:
        rows: Rows that all ranks together answer.
        what: What is answered, after the number of batches.
        last_line: Whether there is a line when all rows are answered.
    """
    batches = math.ceil(rows / (batch_size * trainer.world_size))
    bar = live_progress(trainer)
    if bar is not None:
        task = bar.add_task("Answering", total=batches)
        yield lambda: bar.advance(task)
        bar.remove_task(task)
    elif trainer.progress_bar_callback is None:
        yield lambda: None
    else:
        yield LineCounter("answering", f"batches{what}", batches, last_line=last_line).advance
