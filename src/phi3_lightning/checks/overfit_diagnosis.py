"""Overfitting with the user's rows or good ones and the user's settings or good ones: which of them is at fault.

Good rows are the package's own chats in the user's template. Good settings are LoRA of rank 16 without dropout on the
four linear layers of each block, AdamW without decay at the first of a few constant rates that overfits, clipped at 1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_lightning.checks import overfit
from phi3_lightning.checks.overfit import OverfitCase, OverfitResult
from phi3_lightning.checks.result import Result
from phi3_lightning.checks.round_trip import CheckpointRoundTrip
from phi3_lightning.checks.rows import Row
from phi3_lightning.checks.shared_base import SharedBase
from phi3_lightning.config import LoRA, Optimizer
from phi3_lightning.data.collate import collate, pad_id
from phi3_lightning.data.template import ChatTemplate
from phi3_lightning.hardware import program

GOOD_ROWS_GOOD_SETTINGS = "good rows, good settings"
MY_ROWS_GOOD_SETTINGS = "my rows, good settings"
GOOD_ROWS_MY_SETTINGS = "good rows, my settings"
MY_ROWS_MY_SETTINGS = "my rows, my settings"
ROUND_TRIP = "checkpoint round trip"

REMEDIES = {
    GOOD_ROWS_GOOD_SETTINGS: "neither your data nor your settings: the base itself does not learn this. Check that "
    "model.base has trained weights (model.init: pretrained) and knows its end-of-turn token, and try "
    "trainer.precision: bf16-mixed",
    MY_ROWS_GOOD_SETTINGS: "it is your data, or a base too small for them ({sizes}). Try a larger base of the same "
    "tokenizer; where that does not learn them either, look at these rows with {program} preview: their answers may "
    "not follow from their questions",
    GOOD_ROWS_MY_SETTINGS: "it is your settings: model.optimizer.lr (LoRA learns at 1e-4 to 5e-4, a tiny model at "
    "1e-2), model.lora.target_modules, r and lora_alpha, trainer.gradient_clip_val",
    MY_ROWS_MY_SETTINGS: "each is sound alone: your rows need another model.optimizer.lr or more room (model.lora.r)",
    ROUND_TRIP: "checkpoints of this module do not bring it back: do not train before this is fixed",
}


@dataclass
class OverfitDiagnosis:
    """Overfits the four combinations, and writes a checkpoint of one of them."""

    shared_base: SharedBase
    template: ChatTemplate
    clip: float | None
    """The user's ``trainer.gradient_clip_val``."""
    folder: Path
    """For the checkpoint."""
    on_begin: Callable[[str], None]
    on_step: Callable[[], None]
    """As of :class:`~phi3_lightning.checks.suite.Suite`."""

    def case(self, rows: list[Row], plan: list[list[list[int]]]) -> OverfitCase:
        """Lay rows out in the micro-batches of one optimiser step: a plan has their indices, by batch and row."""
        pad = pad_id(self.template.tokenizer)
        batches = [collate([[rows[index].document for index in row] for row in batch], pad) for batch in plan]
        return OverfitCase(rows, batches, self.template.stop_ids, pad)

    def run(self, own: OverfitCase | None, good: OverfitCase) -> Iterator[Result]:
        """Yield the result of each combination; without the user's own rows some are skipped."""
        settings = yield from self._good_settings(good)
        if settings is None:
            yield from (Result.skipped(name, "nothing is learnt here at all") for name in list(REMEDIES)[1:])
            return
        data = Result.skipped(MY_ROWS_GOOD_SETTINGS, "no rows of yours")
        if own is not None:
            self.on_begin(MY_ROWS_GOOD_SETTINGS)
            result = self._overfit(own, 1.0, settings)
            sizes = f"{self.shared_base.base.num_parameters() / 1e6:,.3g} million parameters; these answers have "
            sizes += f"{own.answer_tokens} tokens, those of the good rows {good.answer_tokens}"
            data = self._result(MY_ROWS_GOOD_SETTINGS, result.overfits, result, sizes)
        yield data
        user_settings, round_trip = self._user_settings(good)
        yield user_settings
        if own is None or "FAIL" in (data.outcome, user_settings.outcome):
            yield Result.skipped(MY_ROWS_MY_SETTINGS, "tried where each is sound alone")
        else:
            self.on_begin(MY_ROWS_MY_SETTINGS)
            result = self._overfit(own, self.clip, {})
            yield self._result(MY_ROWS_MY_SETTINGS, result.falls, result)
        yield round_trip

    def _good_settings(self, good: OverfitCase) -> Any:
        """Yield the result; return the settings that overfit, or None."""
        figures = []
        for rate in overfit.known_rates(self.shared_base.base.config.hidden_size):
            self.on_begin(f"{GOOD_ROWS_GOOD_SETTINGS}, lr {rate:g}")
            settings = {
                "lora": LoRA(r=16, lora_alpha=32, lora_dropout=0.0),
                "optimizer": Optimizer(lr=rate),
                "neftune_noise_alpha": None,
            }
            result = self._overfit(good, 1.0, settings)
            figures.append(f"lr {rate:g}: {self._figure(result)}")
            if result.overfits:
                yield Result.of(GOOD_ROWS_GOOD_SETTINGS, True, figures[-1], "")
                return settings
        yield Result.of(GOOD_ROWS_GOOD_SETTINGS, False, "; ".join(figures), REMEDIES[GOOD_ROWS_GOOD_SETTINGS])
        return None

    def _user_settings(self, good: OverfitCase) -> tuple[Result, Result]:
        """Overfit with the user's settings, and read a checkpoint of that into a fresh module."""
        self.on_begin(GOOD_ROWS_MY_SETTINGS)
        base = self.shared_base
        with base.module() as module:
            result, trainer = overfit.overfit(module, good, base.make_trainer, self.clip, self.on_step)
            settings = self._result(GOOD_ROWS_MY_SETTINGS, result.falls, result)
            if result.divergence is not None:
                return settings, Result.skipped(ROUND_TRIP, "training diverged and left nothing to write")
            self.on_begin(ROUND_TRIP)
            trip = CheckpointRoundTrip(base, module, trainer, good.batches, self.folder / "check.ckpt")
        with base.module() as fresh:
            faults = trip.faults(fresh)
        figure = f"{trip.size / 1e6:.1f} MB, tensors and loss the same to the bit"
        if faults:
            figure = f"{len(faults)} differ: {', '.join(faults[:3])}"
        return settings, Result.of(ROUND_TRIP, not faults, figure, REMEDIES[ROUND_TRIP])

    def _overfit(self, case: OverfitCase, clip: float | None, changes: dict[str, Any]) -> OverfitResult:
        with self.shared_base.module(**changes) as module:
            return overfit.overfit(module, case, self.shared_base.make_trainer, clip, self.on_step)[0]

    def _result(self, name: str, holds: bool, result: OverfitResult, sizes: str = "") -> Result:
        limit = f"{overfit.MIN_LOSS_FALL_FRACTION:.0%} lower"
        if name == MY_ROWS_GOOD_SETTINGS:
            limit = f"below {overfit.MAX_OVERFIT_LOSS:.2g}"
        remedy = REMEDIES[name].format(sizes=sizes, program=program())
        return Result.of(name, holds, f"{self._figure(result)} (limit: {limit})", remedy)

    def _figure(self, result: OverfitResult) -> str:
        """The figures, and where the first wrong answer leaves its row, if most are right."""
        pairs = zip(result.answers, result.case.rows, strict=False)
        mistakes = filter(None, (self._mistake(answer, row) for answer, row in pairs))
        return f"{result}{next(mistakes, '') if result.last_loss < overfit.MAX_OVERFIT_LOSS else ''}"

    def _mistake(self, answer: list[int], row: Row) -> str:
        for token, correct in zip(answer, row.answer, strict=False):
            if token != correct:
                text, expected = map(self.template.tokenizer.decode, ([token], [correct]))
                return f"; {row.place} gets {text!r} for {expected!r}"
        return ""
