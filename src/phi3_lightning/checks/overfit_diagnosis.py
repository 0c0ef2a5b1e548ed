"""Overfitting with the user's rows or good ones and the user's settings or good ones: which of them is at fault.

Good rows are the package's own chats in the user's template, or preferences made of them. Good settings are LoRA of
rank 16 without dropout on the four linear layers of each block, AdamW without decay at the first of a few constant
rates that overfits, clipped at 1, and the user's objective with the values of its paper.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phi3_lightning.checks import overfit
from phi3_lightning.checks.overfit import OverfitCase, OverfitResult
from phi3_lightning.checks.result import Result
from phi3_lightning.checks.round_trip import CheckpointRoundTrip
from phi3_lightning.checks.rows import Row
from phi3_lightning.checks.shared_base import SharedBase
from phi3_lightning.config import LoRA, Objective, Optimizer
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

PREFERENCE_REMEDIES = {
    MY_ROWS_GOOD_SETTINGS: "it is your data, or a base too small for them ({sizes}). Look at these rows with {program} "
    "preview: do the answers differ in what is trained, and is the better one the chosen or good one",
    GOOD_ROWS_MY_SETTINGS: "it is your settings: model.optimizer.lr (preferences take a tenth to a fiftieth of the "
    "rate of chats), model.objective, model.lora.target_modules, r and lora_alpha, trainer.gradient_clip_val",
}
"""What to do instead where the rows are preferences."""


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
        changes, note = self._user_rate(settings["optimizer"].lr)
        user_settings, round_trip = self._user_settings(good, changes, note)
        yield user_settings
        if own is None or "FAIL" in (data.outcome, user_settings.outcome):
            yield Result.skipped(MY_ROWS_MY_SETTINGS, "tried where each is sound alone")
        else:
            self.on_begin(MY_ROWS_MY_SETTINGS)
            result = self._overfit(own, self.clip, changes)
            yield self._result(MY_ROWS_MY_SETTINGS, result.falls, result, note=note)
        yield round_trip

    def _good_settings(self, good: OverfitCase) -> Any:
        """Yield the result; return the settings that overfit, or None."""
        figures = []
        name = self.shared_base.objective.name
        for rate in overfit.known_rates(self.shared_base.base.config.hidden_size):
            self.on_begin(f"{GOOD_ROWS_GOOD_SETTINGS}, lr {rate:g}")
            settings = {
                "lora": LoRA(r=16, lora_alpha=32, lora_dropout=0.0),
                "optimizer": Optimizer(lr=rate),
                "neftune_noise_alpha": None,
                "objective": Objective(name, beta=2.0 if name == "simpo" else 0.1),
            }
            result = self._overfit(good, 1.0, settings)
            figures.append(f"lr {rate:g}: {self._figure(result)}")
            if result.overfits:
                yield Result.of(GOOD_ROWS_GOOD_SETTINGS, True, figures[-1], "")
                return settings
        yield Result.of(GOOD_ROWS_GOOD_SETTINGS, False, "; ".join(figures), REMEDIES[GOOD_ROWS_GOOD_SETTINGS])
        return None

    def _user_rate(self, good_rate: float) -> tuple[dict[str, Any], str]:
        """The change to the user's settings with which 20 steps show whether preferences are learnt, and a note."""
        optimizer = self.shared_base.optimizer
        rate = max(optimizer.lr, min(overfit.PREFERENCE_RATE_FACTOR * optimizer.lr, good_rate))
        if self.shared_base.objective.name == "supervised" or rate == optimizer.lr:
            return {}, ""
        note = f"lr {rate:g}, since {overfit.OVERFIT_STEPS} steps are too few for {optimizer.lr:g}: "
        return {"optimizer": replace(optimizer, lr=rate)}, note

    def _user_settings(self, good: OverfitCase, changes: dict[str, Any], note: str) -> tuple[Result, Result]:
        """Overfit with the user's settings, and read a checkpoint of that into a fresh module."""
        self.on_begin(GOOD_ROWS_MY_SETTINGS)
        base = self.shared_base
        with base.module(**changes) as module:
            result, trainer = overfit.overfit(module, good, base.make_trainer, self.clip, self.on_step)
            settings = self._result(GOOD_ROWS_MY_SETTINGS, result.falls, result, note=note)
            if result.divergence is not None:
                return settings, Result.skipped(ROUND_TRIP, "training diverged and left nothing to write")
            self.on_begin(ROUND_TRIP)
            trip = CheckpointRoundTrip(base, module, trainer, good.batches, self.folder / "check.ckpt")
        with base.module(**changes) as fresh:
            faults = trip.faults(fresh)
        figure = f"{trip.size / 1e6:.1f} MB, tensors and loss the same to the bit"
        if faults:
            figure = f"{len(faults)} differ: {', '.join(faults[:3])}"
        return settings, Result.of(ROUND_TRIP, not faults, figure, REMEDIES[ROUND_TRIP])

    def _overfit(self, case: OverfitCase, clip: float | None, changes: dict[str, Any]) -> OverfitResult:
        with self.shared_base.module(**changes) as module:
            return overfit.overfit(module, case, self.shared_base.make_trainer, clip, self.on_step)[0]

    def _result(self, name: str, holds: bool, result: OverfitResult, sizes: str = "", note: str = "") -> Result:
        limit = f"{overfit.MIN_LOSS_FALL_FRACTION:.0%} lower"
        if name == MY_ROWS_GOOD_SETTINGS:
            limit = f"below {result.max_loss:.2g}"
        remedies = REMEDIES
        if self.shared_base.objective.name != "supervised":
            remedies = REMEDIES | PREFERENCE_REMEDIES
        remedy = remedies[name].format(sizes=sizes, program=program())
        return Result.of(name, holds, f"{note}{self._figure(result)} (limit: {limit})", remedy)

    def _figure(self, result: OverfitResult) -> str:
        """The figures, and where the first wrong answer leaves its row, if most are right."""
        pairs = zip(result.answers, result.case.rows, strict=False)
        mistakes = filter(None, (self._mistake(answer, row) for answer, row in pairs))
        return f"{result}{next(mistakes, '') if result.last_loss < result.max_loss else ''}"

    def _mistake(self, answer: list[int], row: Row) -> str:
        for token, correct in zip(answer, row.answer, strict=False):
            if token != correct:
                text, expected = map(self.template.tokenizer.decode, ([token], [correct]))
                return f"; {row.place} gets {text!r} for {expected!r}"
        return ""
