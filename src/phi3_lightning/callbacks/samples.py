"""Sample answers of base and tuned model, side by side, during training."""

from dataclasses import replace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from phi3_lightning.batch import IGNORE_INDEX, Batch, PromptBatch
from phi3_lightning.batch.documents import document_spans
from phi3_lightning.batch.padding import prompt_batch, unpadded
from phi3_lightning.callbacks.tensorboard import log_table, step_of
from phi3_lightning.checkpoint.averaging import averaged_weights
from phi3_lightning.config.checks import require
from phi3_lightning.contracts import HasTokenizer, data_module
from phi3_lightning.evaluate import cases
from phi3_lightning.generation.decode import generate
from phi3_lightning.module import Phi3LoRAModule
from phi3_lightning.progress import table_console


class Sample(NamedTuple):
    """A prompt and its answers, as text."""

    prompt: str
    base: str
    tuned: str


class Samples(pl.Callback):
    """Shows the answers to a few prompts: after each validation as lines and in the loggers, at the end as a table.

    The base model answers once. All ranks generate the same answers, and each validation draws the same random numbers.
    With ``WeightAveraging`` the averaged weights answer, which are those that a validation measures.

    Args:
        prompts: Number of prompts; 0: none.
        max_new_tokens: Longest answer, in tokens.
        from_predict: Whether the prompts are those of ``data.predict``; else they are the first of the validation data,
            up to their first answer.
    """

    def __init__(self, prompts: int = 3, max_new_tokens: int = 64, from_predict: bool = False) -> None:
        require(prompts >= 0, "monitor.samples", prompts, "it is 0 or more")
        require(max_new_tokens >= 1, "monitor.sample_tokens", max_new_tokens, "it is at least 1")
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.from_predict = from_predict
        self._console = table_console()
        self._validation_batch: Batch | None = None
        self._prompts: PromptBatch | None = None
        self._base_answers: list[str] = []
        self._samples: list[Sample] = []
        self._sampled_step = -1

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and self._validation_batch is None:
            self._validation_batch = batch

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: Phi3LoRAModule) -> None:  # type: ignore[override]
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._samples = self._answer(trainer, pl_module)
            self._sampled_step = trainer.global_step
            self._print_lines(trainer.global_step)
            if self._samples:
                log_table(trainer, "samples", Sample._fields, self._samples, step_of(trainer))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: Phi3LoRAModule) -> None:  # type: ignore[override]
        if self._sampled_step != trainer.global_step:  # when fit ends, the model has left its device
            self._samples = self._answer(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: Phi3LoRAModule) -> None:  # type: ignore[override]
        self._print_table()

    @torch.no_grad()
    def _answer(self, trainer: pl.Trainer, module: Phi3LoRAModule) -> list[Sample]:
        data = data_module(trainer)
        if self.prompts == 0 or not isinstance(data, HasTokenizer):
            return []
        if self._prompts is None:
            self._prompts = trainer.strategy.broadcast(self._first_prompts(data))
        if self._prompts is None:
            return []
        batch = trainer.strategy.batch_to_device(self._prompts)
        if not self._base_answers:
            with module.base_answers():
                self._base_answers = self._texts(module, batch, data.tokenizer)
        with averaged_weights(trainer, module):
            tuned = self._texts(module, batch, data.tokenizer)
        prompts = data.tokenizer.batch_decode(unpadded(batch), skip_special_tokens=True)
        return [Sample(*texts) for texts in zip(prompts, self._base_answers, tuned, strict=True)]

    def _texts(self, module: Phi3LoRAModule, batch: PromptBatch, tokenizer: Any) -> list[str]:
        limit = min(self.max_new_tokens, module.generation.max_new_tokens)
        devices = [module.device] if module.device.type == "cuda" else []
        with module.autocast(), torch.random.fork_rng(devices):
            torch.manual_seed(0)  # the same on every rank and at each validation
            ids = generate(module.loaded_model, batch, replace(module.generation, max_new_tokens=limit))
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _first_prompts(self, data: HasTokenizer) -> PromptBatch | None:
        if self.from_predict:
            prompts, stop_ids = _prompts_to_predict(data)
        elif self._validation_batch is not None:
            prompts, stop_ids = _validation_prompts(self._validation_batch, data.tokenizer)
        else:
            return None
        prompts = prompts[: self.prompts]
        return prompt_batch(prompts, list(range(len(prompts))), stop_ids) if prompts else None

    def _print_lines(self, step: int) -> None:
        lines = [f"  {each.prompt}\n    base:  {each.base}\n    tuned: {each.tuned}" for each in self._samples]
        if lines:
            rank_zero_info("\n".join([f"step {step}, answers:", *lines]))

    @rank_zero_only
    def _print_table(self) -> None:
        if not self._samples:
            return
        table = Table(title="answers", show_lines=True)
        for column in Sample._fields:
            table.add_column(column, ratio=1)
        for sample in self._samples:
            table.add_row(*map(Text, sample))  # Text: an answer may hold square brackets
        self._console.print(table, highlight=False)


def _prompts_to_predict(data: Any) -> tuple[list[list[int]], list[int]]:
    """The prompts of ``data.predict``, in the order of the file, and the stop tokens."""
    data.setup("predict")
    rows: dict[int, list[int]] = {}
    stop_ids: set[int] = set()
    for batch in data.predict_dataloader():
        rows |= dict(zip(batch["document_ids"], unpadded(batch), strict=False))  # a filler row has no id
        stop_ids |= set(batch["stop_ids"])
    return [rows[row] for row in sorted(rows)], sorted(stop_ids)


def _validation_prompts(batch: Batch, tokenizer: Any) -> tuple[list[list[int]], list[int]]:
    """The tokens before the first supervised one of each document, of a pair once, and the stop tokens."""
    prompts: dict[int, list[int]] = {}
    for row, tokens, document_id in document_spans(batch):
        supervised = (batch["labels"][row, tokens] != IGNORE_INDEX).nonzero()
        if len(supervised):
            prompts.setdefault(document_id, batch["input_ids"][row, tokens][: int(supervised[0])].tolist())
    usable = [case for case in cases.cases(batch) if cases.unusable(case, tokenizer) is None]
    return list(prompts.values()), cases.stop_ids(usable, tokenizer)
