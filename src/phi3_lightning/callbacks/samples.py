"""Answers of base and tuned model, side by side, as training goes on."""

from dataclasses import replace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from phi3_lightning.batch import IGNORE_INDEX, Batch, PromptBatch
from phi3_lightning.batch.documents import document_spans
from phi3_lightning.batch.padding import prompt_batch, unpadded
from phi3_lightning.callbacks.tensorboard import boards, literal, step_of
from phi3_lightning.config.checks import require
from phi3_lightning.contracts import HasTokenizer
from phi3_lightning.evaluate import cases
from phi3_lightning.generation.decode import generate
from phi3_lightning.module import Phi3LoRAModule


class Answers(NamedTuple):
    """Texts of one prompt."""

    prompt: str
    base: str
    tuned: str


class Samples(pl.Callback):
    """Shows how a few prompts are answered: after each validation as lines and as TensorBoard text, at the end a table.

    The base model answers once. All ranks write the same answers, and every validation draws the same random numbers.

    Args:
        prompts: How many; 0: none.
        max_new_tokens: Longest answer, in tokens.
        from_predict: Whether the prompts are those of ``data.predict``; else the first of the validation data, up to
            their first answer.
    """

    def __init__(self, prompts: int = 3, max_new_tokens: int = 64, from_predict: bool = False) -> None:
        require(prompts >= 0, "monitor.samples", prompts, "it is 0 or more")
        require(max_new_tokens >= 1, "monitor.sample_tokens", max_new_tokens, "it is at least 1")
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.from_predict = from_predict
        self._console = Console()
        self._validated: Batch | None = None
        self._asked: PromptBatch | None = None
        self._base: list[str] = []
        self._told: list[Answers] = []
        self._told_step = -1

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and self._validated is None:
            self._validated = batch

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: Phi3LoRAModule) -> None:  # type: ignore[override]
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._told = self._answer(trainer, pl_module)
            self._told_step = trainer.global_step
            self._print_lines(trainer.global_step)
            for writer in boards(trainer):
                writer.add_text("samples", _as_markdown(self._told), step_of(trainer))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: Phi3LoRAModule) -> None:  # type: ignore[override]
        if self._told_step != trainer.global_step:  # here and not when fit ends: the model has left its device by then
            self._told = self._answer(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: Phi3LoRAModule) -> None:  # type: ignore[override]
        self._print_table()

    @torch.no_grad()
    def _answer(self, trainer: pl.Trainer, module: Phi3LoRAModule) -> list[Answers]:
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning types it as None
        if self.prompts == 0 or not isinstance(data, HasTokenizer):
            return []
        if self._asked is None:
            self._asked = trainer.strategy.broadcast(self._find(data))
        if self._asked is None:
            return []
        batch = trainer.strategy.batch_to_device(self._asked)
        if not self._base:
            with module.base_answers():
                self._base = self._texts(module, batch, data.tokenizer)
        said = data.tokenizer.batch_decode(unpadded(batch), skip_special_tokens=True)
        tuned = self._texts(module, batch, data.tokenizer)
        return [Answers(*texts) for texts in zip(said, self._base, tuned, strict=True)]

    def _texts(self, module: Phi3LoRAModule, batch: PromptBatch, tokenizer: Any) -> list[str]:
        limit = min(self.max_new_tokens, module.generation.max_new_tokens)
        devices = [module.device] if module.device.type == "cuda" else []
        with module.autocast(), torch.random.fork_rng(devices):
            torch.manual_seed(0)  # on every rank alike, and at each validation
            ids = generate(module.loaded_model, batch, replace(module.generation, max_new_tokens=limit))
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _find(self, data: HasTokenizer) -> PromptBatch | None:
        if self.from_predict:
            prompts, stop_ids = _prompts_to_predict(data)
        elif self._validated is not None:
            prompts, stop_ids = _first_prompts(self._validated, data.tokenizer)
        else:
            return None
        prompts = prompts[: self.prompts]
        return prompt_batch(prompts, list(range(len(prompts))), stop_ids) if prompts else None

    @rank_zero_only
    def _print_lines(self, step: int) -> None:
        lines = [f"  {text.prompt}\n    base:  {text.base}\n    tuned: {text.tuned}" for text in self._told]
        if lines:
            rank_zero_info("\n".join([f"step {step}, answers:", *lines]))

    @rank_zero_only
    def _print_table(self) -> None:
        if not self._told:
            return
        table = Table(title="answers", show_lines=True)
        for column in Answers._fields:
            table.add_column(column, ratio=1)
        for texts in self._told:
            table.add_row(*map(Text, texts))  # Text: an answer may hold square brackets
        self._console.print(table, highlight=False)


def _prompts_to_predict(data: Any) -> tuple[list[list[int]], list[int]]:
    """The prompts of ``data.predict``, in the order of the file, and what ends an answer."""
    data.setup("predict")
    rows: dict[int, list[int]] = {}
    stop_ids: set[int] = set()
    for batch in data.predict_dataloader():
        rows |= dict(zip(batch["document_ids"], unpadded(batch), strict=False))  # a filler row has no id
        stop_ids |= set(batch["stop_ids"])
    return [rows[row] for row in sorted(rows)], sorted(stop_ids)


def _first_prompts(batch: Batch, tokenizer: Any) -> tuple[list[list[int]], list[int]]:
    """What comes before the first supervised token of each document, and what ends an answer."""
    prompts = []
    for row, tokens, _ in document_spans(batch):
        supervised = (batch["labels"][row, tokens] != IGNORE_INDEX).nonzero()
        if len(supervised):
            prompts.append(batch["input_ids"][row, tokens][: int(supervised[0])].tolist())
    whole = [case for case in cases.cases(batch) if cases.unusable(case, tokenizer) is None]
    return prompts, cases.stop_ids(whole, tokenizer)


def _as_markdown(answers: list[Answers]) -> str:
    rows = ["| prompt | base | tuned |", "|---|---|---|"]
    for texts in answers:
        rows.append(f"| {' | '.join(literal(text).replace(chr(10), '<br>') for text in texts)} |")
    return "\n".join(rows)
