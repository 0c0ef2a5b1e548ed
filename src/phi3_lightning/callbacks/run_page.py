"""What a run was made of, and what came of it, on TensorBoard's pages for text, pictures and hyper-parameters."""

import re
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont
from typing_extensions import override

from phi3_lightning.batch import IGNORE_INDEX, Batch
from phi3_lightning.callbacks.board import boards, literal, step_of
from phi3_lightning.callbacks.samples import Chats
from phi3_lightning.segments import segments

SHOWN_TOKENS = 400
"""Tokens of a row that are shown; a packed one may have thousands."""

RESULTS = ("train/loss", "val/", "forgetting/")
"""Beginnings of the names of the numbers that hyper-parameters are judged by."""

WIDTH, MARGIN, FONT = 960, 12, 15
"""Of the picture, in pixels."""

INK, TRAINED, SPECIAL = (40, 40, 46), (205, 240, 213), (138, 28, 138)
"""Colours: text, the ground behind what is trained, special tokens."""


class Part(NamedTuple):
    """Neighbouring tokens of a row that are treated alike."""

    text: str
    trained: bool
    special: bool


class RunPage(pl.Callback):
    """Shows the first training rows with the trained tokens marked, and at the end hyper-parameters with their results.

    The rows are those of the first batch that is trained, as the model gets them. A logger that has no page for text or
    pictures is left alone.

    Args:
        rows: How many rows are shown.
    """

    def __init__(self, rows: int = 3) -> None:
        self.rows = rows

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning types it as None
        if trainer.global_step or batch_idx or not isinstance(data, Chats):
            return
        for writer in boards(trainer):
            shown = [parts(batch, row, data.tokenizer) for row in range(min(self.rows, len(batch["lengths"])))]
            writer.add_text("data/first_rows", as_markdown(shown), 0)
            writer.add_image("data/first_rows", np.asarray(picture(shown)), 0, dataformats="HWC")

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        results = {
            f"result/{name.replace('/', '_')}": value.item()
            for name, value in trainer.callback_metrics.items()
            if name.startswith(RESULTS)
        }
        hyper_parameters = dict(pl_module.hparams) | {
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "world_size": trainer.world_size,
            "precision": trainer.precision,
        }
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and results:
                logger.log_hyperparams(hyper_parameters, results, step=step_of(trainer))


def parts(batch: Batch, row: int, tokenizer: Any) -> list[Part]:
    """Divide the beginning of a row by what becomes of its tokens.

    Args:
        batch: The batch.
        row: Which row.
        tokenizer: Turns tokens into text.
    """
    end = min(sum(batch["lengths"][row]), SHOWN_TOKENS)
    ids, labels = (batch[name][row, :end].tolist() for name in ("input_ids", "labels"))
    found = segments(ids, [label != IGNORE_INDEX for label in labels], tokenizer)
    return [Part(segment.text, segment.trained, segment.special) for segment in found]


def as_markdown(rows: list[list[Part]]) -> str:
    """Write rows as text with what is trained in bold.

    Args:
        rows: The parts of each.
    """
    written = []
    for row in rows:
        words = (literal(part.text) for part in row)
        marked = (f"<strong>{word}</strong>" if part.trained else word for part, word in zip(row, words, strict=True))
        written.append(f"<pre>{''.join(marked)}</pre>")
    return "Bold is trained, everything else is context.\n\n" + "\n\n".join(written)


def picture(rows: list[list[Part]]) -> Image.Image:
    """Draw rows: what is trained on a green ground, special tokens in purple, everything else is context.

    The font has the letters of European languages; the text page has all others.

    Args:
        rows: The parts of each.
    """
    font = ImageFont.load_default(FONT)
    line = FONT + 8
    placed: list[tuple[int, int, str, Part]] = []
    x, y = MARGIN, MARGIN
    for row in rows:
        for word, part in ((word, each) for each in row for word in _words(each.text)):
            width = round(font.getlength(word.rstrip("\n")))
            if x + width > WIDTH - MARGIN and x > MARGIN:
                x, y = MARGIN, y + line
            placed.append((x, y, word.rstrip("\n"), part))
            x += width
            if word.endswith("\n"):
                x, y = MARGIN, y + line
        x, y = MARGIN, y + 2 * line
    canvas = Image.new("RGB", (WIDTH, y + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for x, y, word, part in placed:
        if part.trained:
            draw.rectangle((x, y - 2, x + font.getlength(word), y + FONT + 4), fill=TRAINED)
        draw.text((x, y), word, font=font, fill=SPECIAL if part.special else INK)
    return canvas


def _words(text: str) -> list[str]:
    """Words with the white space around them, long ones in pieces; a line's end is the end of a word."""
    return re.findall(r"[^\S\n]*\S{0,60}[^\S\n]*\n|[^\S\n]*\S{1,60}[^\S\n]*|[^\S\n]+", text)
