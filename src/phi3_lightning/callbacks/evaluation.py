"""``test``: base and tuned model side by side, in losses and in answers, and a report of it."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from phi3_lightning.batch import Batch
from phi3_lightning.config.checks import require
from phi3_lightning.contracts import DescribedData, HasTokenizer, data_module, origins
from phi3_lightning.distributed.collectives import all_gather_dict, all_gather_object
from phi3_lightning.errors import ConfigError, DataError, ModelError
from phi3_lightning.evaluate import page, ranking
from phi3_lightning.evaluate.answering import Answering, ScoredAnswer, answering_progress, live_progress
from phi3_lightning.evaluate.bootstrap import Comparison, Statistics
from phi3_lightning.evaluate.cases import Case, CaseCollector
from phi3_lightning.evaluate.own_metrics import Measure, own_scores, rows_by_id
from phi3_lightning.evaluate.report import (
    TOKEN_SCORES,
    AnswerPair,
    Report,
    answer_values,
    measure_answers,
    measure_tokens,
    table,
)
from phi3_lightning.event_files import read_scalars
from phi3_lightning.files import local_path
from phi3_lightning.jsonl import PartialJsonl
from phi3_lightning.metrics.answers import Score, scores
from phi3_lightning.model import loss
from phi3_lightning.module import Phi3LoRAModule
from phi3_lightning.progress import table_console


class EvaluationReport(pl.Callback):
    """Compares base and tuned model on the test data, and writes ``test.json``, ``test.md`` and ``test.html``.

    Token losses are measured on all rows: of preferences on chosen or good answers, and also how often each model ranks
    them above rejected or bad ones. For some rows both models generate an answer, whose reference is the last trained
    turn; intervals are by the bootstrap. After an interruption, the answers so far stay in
    ``test.partial.RANK.jsonl``. It needs a Phi3LoRAModule, and for answers a datamodule with a ``tokenizer``.

    Args:
        folder: The folder of the report; null: the run's folder, or in a script the Trainer's ``default_root_dir``.
        rows: How many rows both models answer, the same ones each time; null: all, 0: none. Needs the extra eval.
        batch_size: Prompts that are answered together: more are faster, and take more memory.
        resamples: Bootstrap draws of the rows for each interval.
        metrics: The user's own metrics: import paths ``module:function`` of functions ``(answer, reference, row) ->
            float``, or such functions.
    """

    def __init__(
        self,
        folder: str | None = None,
        rows: int | None = 100,
        batch_size: int = 16,
        resamples: int = 1000,
        metrics: str | Sequence[str | Measure] = (),
    ) -> None:
        if rows is not None:
            require(rows >= 0, "evaluation.rows", rows, "it is 0 or more, or null for all")
        require(batch_size >= 1, "evaluation.batch_size", batch_size, "it is at least 1")
        require(resamples >= 100, "evaluation.resamples", resamples, "fewer draws give no 95% interval; 1000 are usual")
        self.folder = None if folder is None else local_path("evaluation.folder", folder)
        self.rows = rows
        self.batch_size = batch_size
        self.resamples = resamples
        self._own = own_scores(metrics)
        self._scores: dict[str, Score] = {}
        self._checkpoint: dict[str, Any] = {}
        self._tokens: dict[int, Statistics] = {}
        self._ranks: dict[int, Statistics] = {}
        self._labelled: dict[int, Statistics] = {}
        self._collector = CaseCollector(rows)
        self._partial = PartialJsonl(Path("test"), 0)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        data = data_module(trainer)
        # Lightning saves the state of a data module under the name of its class
        state = checkpoint.get(type(data).__qualname__, {}) if isinstance(data, DescribedData) else {}
        self._checkpoint = {"step": checkpoint["global_step"], "statistics": state.get("statistics", {})}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "test":
            return
        self._checkpoint = {}  # of a run before
        if not isinstance(pl_module, Phi3LoRAModule):
            kind = type(pl_module).__name__
            raise ModelError(f"EvaluationReport: {kind} has no adapter to switch off; it compares a Phi3LoRAModule")
        if self.folder is None:
            self.folder = Path(trainer.default_root_dir)
        if self.rows == 0:
            return
        self._scores = scores() | self._own
        if not isinstance(data_module(trainer), HasTokenizer):
            raise ConfigError(
                "evaluation.rows: answers need a datamodule whose attribute tokenizer turns ids into text; give it "
                "one, or set evaluation.rows: 0 to measure token losses alone"
            )

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._partial = PartialJsonl(cast("Path", self.folder) / "test", trainer.global_rank)
        self._tokens, self._ranks, self._labelled = {}, {}, {}
        self._collector = CaseCollector(self.rows)

    @override
    def on_test_batch_end(  # type: ignore[override]
        self,
        trainer: pl.Trainer,
        pl_module: Phi3LoRAModule,
        outputs: torch.Tensor,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        with trainer.precision_plugin.test_step_context(), pl_module.autocast():
            tuned = loss.by_document(outputs, pl_module.head, batch)
            with pl_module.base_answers():
                base = loss.by_document(pl_module(batch), pl_module.head, batch)
        document_ids = [document_id for row in batch["document_ids"] for document_id in row]
        measured = torch.cat([base, tuned], dim=-1).cpu().numpy()
        shown = ranking.reference_documents(batch)
        self._tokens |= {document_ids[index]: measured[index] for index in shown}
        if "shared_lengths" in batch:
            self._ranks |= dict(zip(document_ids[::2], ranking.ranks(measured), strict=True))
        elif "preferred" in batch:
            good = np.array([flag for row in batch["preferred"] for flag in row], dtype=np.float64)
            means = ranking.mean_logps(measured)
            self._labelled |= dict(zip(document_ids, np.column_stack([means, good]), strict=True))
        if self.rows != 0:
            self._collector.add(batch, data_module(trainer).tokenizer)

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: Phi3LoRAModule) -> None:  # type: ignore[override]
        by_row = all_gather_dict(trainer, self._tokens)
        tokens = np.array([by_row[row] for row in sorted(by_row) if by_row[row][-1] > 0])
        if not len(tokens):
            raise DataError("the test data have no trained token: there is nothing to measure")
        base, tuned = tokens[:, :3], tokens[:, 3:]
        # the tuned model's are logged by test_step
        _log(pl_module, "test_base", {name: value(base.sum(0).tolist()) for name, value in TOKEN_SCORES.items()})
        ranked = ranking.measure_ranking(_all_rows(trainer, self._ranks), self.resamples)
        ranked |= ranking.measure_ranking_by_label(_all_rows(trainer, self._labelled), self.resamples)
        _log(pl_module, "test_base", {name: comparison.base.value for name, comparison in ranked.items()})
        answers = self._answer(trainer, pl_module) if self.rows != 0 else []
        left_out = all_gather_dict(trainer, self._collector.left_out)
        if trainer.is_global_zero and not cast("Any", trainer).fast_dev_run:
            metrics = measure_tokens(base, tuned, self.resamples) | ranked
            metrics |= measure_answers(answers, self._scores, self.resamples)
            self._write(trainer, pl_module, metrics, len(tokens), answers, Counter(left_out.values()))
        self._partial.remove()

    def _answer(self, trainer: pl.Trainer, module: Phi3LoRAModule) -> list[AnswerPair]:
        chosen = self._collector.choose(trainer)
        ids = [case.document_id for case in chosen]
        rows = rows_by_id(data_module(trainer), "test", ids) if self._own else {}
        answering = Answering(trainer, module, "test", chosen, self._scores, rows)
        own: list[AnswerPair] = []
        what = ", base and tuned model"
        with answering_progress(trainer, len(chosen), self.batch_size, what, last_line=True) as advance:
            for batch in answering.batches(self.batch_size):
                with trainer.precision_plugin.predict_step_context():
                    tuned = answering.answer(batch)
                    with module.base_answers():
                        base = answering.answer(batch)
                for pair in self._pairs(batch, base, tuned, answering.tokenizer):
                    self._partial.add(pair.content())
                    own.append(pair)
                advance()
        shares = all_gather_object(trainer, own)
        pairs = sorted((pair for share in shares for pair in share), key=lambda pair: pair.row)
        if pairs:
            _log(module, "test", answer_values(self._scores, [pair.tuned_statistics for pair in pairs]))
            _log(module, "test_base", answer_values(self._scores, [pair.base_statistics for pair in pairs]))
        return pairs

    def _pairs(
        self, batch: list[Case], base: list[ScoredAnswer], tuned: list[ScoredAnswer], tokenizer: Any
    ) -> list[AnswerPair]:
        return [
            AnswerPair(
                case.document_id, tokenizer.decode(case.prompt), base_answer, tuned_answer, base_counts, tuned_counts,
                tuple(self._own),
            )
            for case, (base_answer, base_counts), (tuned_answer, tuned_counts) in zip(batch, base, tuned, strict=True)
        ]  # fmt: skip

    def _write(
        self,
        trainer: pl.Trainer,
        module: Phi3LoRAModule,
        metrics: Mapping[str, Comparison],
        rows: int,
        answers: list[AnswerPair],
        left_out: Mapping[str, int],
    ) -> None:
        folder = cast("Path", self.folder)
        data, answered_rows = _test_facts(trainer), [pair.row for pair in answers]
        sources = origins(data_module(trainer), "test", answered_rows)
        config = folder / "config.yaml"
        report = Report(
            run=folder.resolve().name,
            checkpoint=None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            step=self._checkpoint.get("step"),
            data=data | {"statistics": self._checkpoint.get("statistics", {}) | data["statistics"]},
            metrics=metrics,
            rows=rows,
            left_out=left_out,
            generation=module.hparams["generation"],
            resamples=self.resamples,
            answers=answers,
            scores=self._scores,
            origins=dict(zip(answered_rows, sources, strict=True)),
            curves=read_scalars(folder / "tensorboard"),
            config=config.read_text(encoding="utf-8") if config.is_file() else "",
            certificates={
                str(path.relative_to(folder)): json.loads(path.read_text(encoding="utf-8"))
                for path in sorted(folder.glob("**/certificate.json"))
            },
        )
        folder.mkdir(parents=True, exist_ok=True)
        files = {"json": report.content(), "md": page.render_markdown(report), "html": page.render_html(report)}
        for suffix, text in files.items():
            temporary = folder / f"test.{suffix}.tmp"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(folder / f"test.{suffix}")
        bar = live_progress(trainer)  # whose console prints above the bars
        _print(table_console() if bar is None else bar.console, report, [folder / f"test.{suffix}" for suffix in files])

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._partial.log_path()


def _all_rows(trainer: pl.Trainer, statistics: Mapping[int, Statistics]) -> Statistics:
    """The statistics of all ranks, in the order of their rows."""
    by_row = all_gather_dict(trainer, statistics)
    return np.array([by_row[row] for row in sorted(by_row)])


def _log(module: Phi3LoRAModule, stage: str, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        module.log(f"{stage}/{name}", value, sync_dist=True)


def _test_facts(trainer: pl.Trainer) -> dict[str, Any]:
    data = data_module(trainer)
    if isinstance(data, DescribedData):
        return data.test_facts()
    return {"source": f"{type(data).__name__}.test_dataloader" if data else "a dataloader", "statistics": {}}


def _print(console: Console, report: Report, files: list[Path]) -> None:
    metrics = Table(title="base and tuned model on the test data")
    for column in ("", "base", "tuned", "tuned minus base"):
        metrics.add_column(column, justify="right" if column else "left")
    for row in table(report.metrics, intervals=False):
        metrics.add_row(*row)
    console.print(metrics, highlight=False)
    for name, value in report.facts().items():
        console.print(f"{name}: {value}", highlight=False, markup=False)
    console.print("report: " + ", ".join(map(str, files)), highlight=False, markup=False)
