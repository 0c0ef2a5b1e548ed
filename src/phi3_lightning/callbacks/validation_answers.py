"""Answers as metrics of validation: a few fixed rows are answered, and the answers scored."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from typing_extensions import override

from phi3_lightning.batch import Batch
from phi3_lightning.callbacks.checkpoint import RunCheckpoint
from phi3_lightning.checkpoint.averaging import averaged_weights, has_ended
from phi3_lightning.config.checks import require
from phi3_lightning.contracts import HasTokenizer, data_module
from phi3_lightning.distributed.collectives import all_gather_dict
from phi3_lightning.errors import ConfigError, ModelError
from phi3_lightning.evaluate.answering import Answering, answering_progress
from phi3_lightning.evaluate.cases import Case, CaseCollector
from phi3_lightning.evaluate.own_metrics import Measure, own_scores, rows_by_id
from phi3_lightning.evaluate.report import answer_values
from phi3_lightning.metrics.answers import Score, scores
from phi3_lightning.module import Phi3LoRAModule

MEASURED = ("rougeL", "chrf", "exact_match", "stop_rate")
"""The scores of answers that a validation logs, besides the user's own."""


class ValidationAnswers(pl.Callback):
    """Answers some validation rows at each validation, or each k-th, and logs ``val/rougeL`` and the like.

    ``val/rougeL``, ``val/chrf``, ``val/exact_match``, ``val/stop_rate`` and the user's own metrics score the answers to
    the same rows each time, chosen at random from those that can be answered, as :class:`EvaluationReport` scores them.
    ``val/answered_rows`` is the number of these rows, ``speed/answering_seconds`` the time they took. Of preferences,
    the references are the chosen or good answers. The rows are shared out to the ranks, and each counts once. It needs
    a Phi3LoRAModule and a datamodule with a ``tokenizer``.

    Args:
        val_rows: How many validation rows are answered; 0: none. Needs the extra eval.
        every_n_validations: Validations from one that answers rows to the next; the first one does.
        batch_size: Prompts that are answered together.
        metrics: The user's own metrics: import paths ``module:function`` of functions ``(answer, reference, row) ->
            float``, or such functions.
    """

    def __init__(
        self,
        val_rows: int = 16,
        every_n_validations: int = 1,
        batch_size: int = 16,
        metrics: str | Sequence[str | Measure] = (),
    ) -> None:
        require(val_rows >= 0, "evaluation.val_rows", val_rows, "it is 0 or more")
        require(every_n_validations >= 1, "evaluation.every_n_validations", every_n_validations, "it is at least 1")
        require(batch_size >= 1, "evaluation.batch_size", batch_size, "it is at least 1")
        self.val_rows = val_rows
        self.every_n_validations = every_n_validations
        self.batch_size = batch_size
        self._own = own_scores(metrics)
        self._scores: dict[str, Score] = {}
        self._validations = 0
        self._collector: CaseCollector | None = None
        self._cases: list[Case] | None = None
        self._rows: Mapping[int, Mapping[str, Any]] = {}

    def check_monitors(self, callbacks: Iterable[pl.Callback]) -> None:
        """Refuse to select checkpoints or stop by a score of answers that is not there, stale, or misunderstood.

        Raises:
            ConfigError: It names the option to change.
        """
        every = self.every_n_validations
        for callback in callbacks:
            if not isinstance(callback, ModelCheckpoint | EarlyStopping) or callback.monitor not in self._names():
                continue
            option = "checkpoint" if isinstance(callback, RunCheckpoint) else type(callback).__name__
            monitor = f"{option}.monitor {callback.monitor}"
            require(
                self.val_rows > 0, f"{option}.monitor", callback.monitor, "no row is answered; set evaluation.val_rows"
            )
            remedy = f"{monitor} would keep its former value in between; set 1, or monitor another metric"
            require(every == 1, "evaluation.every_n_validations", every, remedy)
            own = callback.monitor.removeprefix("val/") in self._own
            if isinstance(callback, RunCheckpoint):
                remedy = f"{monitor} is your own metric; give min or max"
                require(not (own and callback.mode_by_name), "checkpoint.mode", None, remedy)
            else:
                remedy = f"a higher {callback.monitor} is better; give mode: max"
                require(own or callback.mode == "max", f"{option}.mode", callback.mode, remedy)

    def check_schedules(self, schedules: Iterable[LRSchedulerConfig]) -> None:
        """Refuse a schedule, such as ``ReduceLROnPlateau``, that follows a score which is not there or stale.

        Raises:
            ConfigError: It names the option to change.
        """
        every = self.every_n_validations
        for config in schedules:
            if not config.reduce_on_plateau or config.monitor not in self._names():
                continue
            monitor = f"monitor {config.monitor} of {type(config.scheduler).__name__}"
            require(self.val_rows > 0, "evaluation.val_rows", 0, f"{monitor} needs rows that are answered")
            remedy = f"{monitor} would keep its former value in between; set 1, or monitor another metric"
            require(every == 1, "evaluation.every_n_validations", every, remedy)

    def _names(self) -> set[str]:
        """Return the scores that are logged."""
        return {f"val/{name}" for name in (*MEASURED, *self._own)}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage not in ("fit", "validate"):
            return
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self.check_monitors(callbacks if stage == "fit" else [])
        self._collector, self._cases, self._validations = None, None, 0  # of a run before
        if self.val_rows == 0:
            return
        if not isinstance(pl_module, Phi3LoRAModule):
            raise ModelError(
                f"ValidationAnswers: {type(pl_module).__name__} cannot answer prompts; give a Phi3LoRAModule"
            )
        if not isinstance(data_module(trainer), HasTokenizer):
            raise ConfigError(
                "evaluation.val_rows: answers need a datamodule whose attribute tokenizer turns ids into text; give it "
                "one, or set evaluation.val_rows: 0"
            )
        every_score = scores("evaluation.val_rows")
        self._scores = {name: every_score[name] for name in MEASURED} | self._own

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        remedy = "there are no validation data; give data.val or data.val_fraction, or set it to 0"
        require(self.val_rows == 0 or sum(trainer.num_val_batches) > 0, "evaluation.val_rows", self.val_rows, remedy)
        self.check_schedules(trainer.lr_scheduler_configs)

    @override
    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: pl.Trainer,
        pl_module: Phi3LoRAModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.val_rows == 0 or trainer.sanity_checking or self._cases is not None:
            return
        if self._collector is None:
            self._collector = CaseCollector(self.val_rows)
        self._collector.add(batch, data_module(trainer).tokenizer)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Phi3LoRAModule) -> None:  # type: ignore[override]
        if self.val_rows == 0 or trainer.sanity_checking:
            return
        if self._cases is None:
            self._choose(trainer)
        due = trainer.state.fn != "fit" or self._validations % self.every_n_validations == 0
        if self._cases and due:
            # a callback that averages weights may have put the current ones back
            averaged = averaged_weights(trainer, pl_module) if has_ended(trainer, self) else nullcontext()
            with averaged:
                self._answer(trainer, pl_module, self._cases)

    def _choose(self, trainer: pl.Trainer) -> None:
        """Choose the rows, the same on every rank, once all of them have been seen."""
        collector = self._collector or CaseCollector(self.val_rows)
        self._collector, self._cases = None, collector.choose(trainer)
        left_out = all_gather_dict(trainer, collector.left_out)
        if not self._cases:
            reasons = ", ".join(sorted(set(left_out.values()))) or "there is none"
            rank_zero_warn(f"evaluation.val_rows: no validation row can be answered ({reasons}); no answer is measured")
        if self._own:
            self._rows = rows_by_id(data_module(trainer), "validate", [case.document_id for case in self._cases])

    def _answer(self, trainer: pl.Trainer, module: Phi3LoRAModule, cases: list[Case]) -> None:
        start = time.monotonic()
        answering = Answering(trainer, module, "validate", cases, self._scores, self._rows)
        own: dict[int, Mapping[str, list[float]]] = {}
        progress = answering_progress(trainer, len(cases), self.batch_size, " of validation rows", last_line=False)
        with trainer.precision_plugin.val_step_context(), progress as advance:
            for batch in answering.batches(self.batch_size):
                answers = answering.answer(batch)
                own |= {case.document_id: each.statistics for case, each in zip(batch, answers, strict=True)}
                advance()
        by_row = all_gather_dict(trainer, own)
        # in the order of rows: sums of floats depend on it
        counts = [by_row[row] for row in sorted(by_row)]
        values = answer_values(self._scores, counts)
        seconds = time.monotonic() - start
        logged = {f"val/{name}": value for name, value in values.items()}
        logged |= {"val/answered_rows": float(len(cases)), "speed/answering_seconds": seconds}
        for name, value in logged.items():
            module.log(name, value, sync_dist=True)  # the same on every rank; without sync_dist Lightning warns
        listing = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        step = trainer.global_step
        rank_zero_info(f"step {step}: {len(cases)} validation rows answered in {seconds:.1f} s: {listing}")

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validations += 1

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations} if self.val_rows else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]
