"""The options of evaluation, and the callbacks that they stand for."""

from dataclasses import dataclass, field
from pathlib import Path

from phi3_lightning.callbacks.evaluation import EvaluationReport
from phi3_lightning.callbacks.validation_answers import ValidationAnswers


@dataclass(frozen=True)
class Evaluation:
    """How answers are measured: by ``test``, which compares base and tuned model, and in validation."""

    folder: str | None = None
    """The folder of the report of test; null: the run's folder."""
    rows: int | None = 100
    """How many test rows both models answer, the same ones each time; null: all, 0: none. Needs the extra eval."""
    batch_size: int = 16
    """Prompts that are answered together: more are faster, and take more memory."""
    resamples: int = 1000
    """Bootstrap draws of the rows for each interval of the report."""
    val_rows: int = 0
    """How many validation rows are answered, the same ones each time, for val/rougeL, val/chrf, val/exact_match and
    val/stop_rate; 0: none. Needs the extra eval."""
    every_n_validations: int = 1
    """Validations from one that answers rows to the next."""
    metrics: str | list[str] = field(default_factory=list)
    """Your own metrics of answers, in validation and in test: import paths, module:function, of functions (answer,
    reference, row) -> float."""

    def callbacks(self, folder: Path) -> tuple[EvaluationReport, ValidationAnswers]:
        """Return the callbacks; ``folder`` is that of the run."""
        report = EvaluationReport(self.folder, self.rows, self.batch_size, self.resamples, self.metrics)
        report.folder = report.folder or folder
        return report, ValidationAnswers(self.val_rows, self.every_n_validations, self.batch_size, self.metrics)
