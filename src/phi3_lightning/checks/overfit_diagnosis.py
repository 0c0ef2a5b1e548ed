"""Learning by heart, with the user's rows or good ones and the user's settings or good ones: which of them is at fault.

Good rows are the package's own chats in the user's template. Good settings are LoRA of rank 16 without dropout on the
four linear layers of each block, AdamW without decay at the first of a few constant rates that learns, clipped at 1.
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
from phi3_lightning.data.collate import collate
from phi3_lightning.data.template import ChatTemplate

GOOD_GOOD = "good rows, good settings"
MINE_GOOD = "my rows, good settings"
GOOD_MINE = "good rows, my settings"
MINE_MINE = "my rows, my settings"
ROUND_TRIP = "checkpoint round trip"

REMEDIES = {
    GOOD_GOOD: "neither your data nor your settings: the base itself does not learn this. See that model.base has "
    "trained weights (model.init: pretrained) and knows its end-of-turn token, and try trainer.precision: bf16-mixed",
    MINE_GOOD: "it is your data, or a base too small for them ({sizes}). Try a larger base of the same tokenizer; "
    "where that does not learn them either, look at these rows with python cli.py preview: their answers may not "
    "follow from their questions",
    GOOD_MINE: "it is your settings: model.optimizer.lr (LoRA learns at 1e-4 to 5e-4, a tiny model at 1e-2), "
    "model.lora.target_modules, r and lora_alpha, trainer.gradient_clip_val",
    MINE_MINE: "each is sound alone: your rows need another model.optimizer.lr or more room (model.lora.r)",
    ROUND_TRIP: "checkpoints of this module do not bring it back: do not train before this is mended",
}


@dataclass
class OverfitDiagnosis:
    """The four lessons, and the checkpoint of one of them.

    Args:
        bench: Holds the base, and the user's settings.
        template: Knows which tokens end an answer.
        clip: The user's ``trainer.gradient_clip_val``.
        folder: For the checkpoint.
        on_begin: Told the name of each check.
        on_step: Told after each optimiser step.
    """

    bench: SharedBase
    template: ChatTemplate
    clip: float | None
    folder: Path
    on_begin: Callable[[str], None]
    on_step: Callable[[], None]

    def lesson(self, rows: list[Row], plan: list[list[list[int]]]) -> OverfitCase:
        """Lay rows out in the micro-batches of one optimiser step.

        Args:
            rows: The rows.
            plan: Indices of rows, for each row of each batch.
        """
        pad = self.template.tokenizer.pad_token_id or 0
        batches = [collate([[rows[index].document for index in row] for row in batch], pad) for batch in plan]
        return OverfitCase(rows, batches, self.template.stop_ids, pad)

    def run(self, mine: OverfitCase | None, good: OverfitCase) -> Iterator[Result]:
        """Yield what came of each lesson.

        Args:
            mine: The user's rows; None where there are none.
            good: Good rows.
        """
        settings = yield from self._good_good(good)
        if settings is None:
            yield from (Result.skipped(name, "nothing is learnt here at all") for name in list(REMEDIES)[1:])
            return
        data = Result.skipped(MINE_GOOD, "no rows of yours")
        if mine is not None:
            self.on_begin(MINE_GOOD)
            learnt = self._learn(mine, 1.0, settings)
            sizes = f"{self.bench.parameters / 1e6:,.3g} million parameters; these answers have {_tokens(mine)} tokens"
            sizes += f", those of the good rows {_tokens(good)}"
            data = self._result(MINE_GOOD, learnt.by_heart, learnt, sizes=sizes)
        yield data
        own, trip = self._good_mine(good)
        yield own
        if mine is None or "FAIL" in (data.outcome, own.outcome):
            yield Result.skipped(MINE_MINE, "tried where each is sound alone")
        else:
            self.on_begin(MINE_MINE)
            learnt = self._learn(mine, self.clip, {})
            yield self._result(MINE_MINE, learnt.falls, learnt)
        yield trip

    def _good_good(self, lesson: OverfitCase) -> Any:
        """Yield the result; return the settings that learn, or None."""
        tried = []
        for rate in overfit.known_rates(self.bench.hidden_size):
            self.on_begin(f"{GOOD_GOOD}, lr {rate:g}")
            settings = good_settings(rate)
            learnt = self._learn(lesson, 1.0, settings)
            tried.append(f"lr {rate:g}: {self._described(learnt)}")
            if learnt.by_heart:
                yield Result.of(GOOD_GOOD, True, tried[-1], "")
                return settings
        yield Result.of(GOOD_GOOD, False, "; ".join(tried), REMEDIES[GOOD_GOOD])
        return None

    def _good_mine(self, lesson: OverfitCase) -> tuple[Result, Result]:
        """What the user's settings learn, and whether a checkpoint of it brings it back."""
        self.on_begin(GOOD_MINE)
        with self.bench.module() as module:
            learnt, trainer = overfit.overfit(module, lesson, self.bench.make_trainer, self.clip, self.on_step)
            own = self._result(GOOD_MINE, learnt.falls, learnt)
            if learnt.diverged is not None:
                return own, Result.skipped(ROUND_TRIP, "nothing was learnt that could be kept")
            self.on_begin(ROUND_TRIP)
            trip = CheckpointRoundTrip(self.bench, module, trainer, lesson.batches, self.folder / "check.ckpt")
        with self.bench.module() as fresh:
            faults = trip.faults(fresh)
        figure = f"{trip.size / 1e6:.1f} MB, tensors and loss the same to the bit"
        if faults:
            figure = f"{len(faults)} differ: {', '.join(faults[:3])}"
        return own, Result.of(ROUND_TRIP, not faults, figure, REMEDIES[ROUND_TRIP])

    def _learn(self, lesson: OverfitCase, clip: float | None, changes: dict[str, Any]) -> OverfitResult:
        with self.bench.module(**changes) as module:
            return overfit.overfit(module, lesson, self.bench.make_trainer, clip, self.on_step)[0]

    def _result(self, name: str, holds: bool, learnt: OverfitResult, **figures: str) -> Result:
        limit = f"below {overfit.BY_HEART:.2g}" if name == MINE_GOOD else f"{overfit.FALLS:.0%} lower"
        remedy = REMEDIES[name].format(**figures)
        return Result.of(name, holds, f"{self._described(learnt)} (limit: {limit})", remedy)

    def _described(self, learnt: OverfitResult) -> str:
        """Figures, and where the first wrong answer leaves the row."""
        slip = next(filter(None, map(self._slip, learnt.answers, learnt.lesson.rows)), None)
        learns = learnt.last < overfit.BY_HEART  # else most answers are wrong, and the first says little
        return f"{learnt}{slip if slip and learns else ''}"

    def _slip(self, answer: list[int], row: Row) -> str | None:
        at = next((at for at, pair in enumerate(zip(answer, row.answer, strict=False)) if pair[0] != pair[1]), None)
        if at is None:
            return None
        said, right = (self.template.tokenizer.decode(ids[at : at + 1]) for ids in (answer, row.answer))
        return f"; {row.place} gets {said!r} for {right!r}"


def _tokens(lesson: OverfitCase) -> int:
    return sum(len(row.answer) for row in lesson.rows)


def good_settings(rate: float) -> dict[str, Any]:
    """Return arguments of the module that learn by heart what can be learnt.

    Args:
        rate: The learning rate.
    """
    return {
        "lora": LoRA(r=16, lora_alpha=32, lora_dropout=0.0),
        "optimizer": Optimizer(lr=rate),
        "neftune_noise_alpha": None,
    }
