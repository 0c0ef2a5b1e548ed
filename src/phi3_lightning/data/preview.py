"""A preview of the data: some documents as the model will see them, and statistics."""

from dataclasses import dataclass
from html import escape
from itertools import groupby

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from phi3_lightning.batch.segments import Segment, segments
from phi3_lightning.config.data import Split
from phi3_lightning.contracts import Origin
from phi3_lightning.data.collate import Document
from phi3_lightning.data.copies import Part, repeated, shared
from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.data.fields import name_unused
from phi3_lightning.data.plans import row_capacity
from phi3_lightning.data.preference_facts import preference_facts
from phi3_lightning.pages import render

_BARS = 24
_BAR_WIDTH = 40  # characters


@dataclass(frozen=True)
class Preview:
    """A preview of one split."""

    facts: dict[str, str]
    """Statistics by name."""
    histogram: list[tuple[int, int]]
    """Lower end of each range of lengths, and the documents in it."""
    samples: list[tuple[str, list[Segment]]]
    """Place and segments of the first documents; a pair has one for each side."""

    def _repr_html_(self) -> str:
        """Return the page for the output of a notebook's cell, in a frame, so that its style stays its own."""
        return f'<iframe srcdoc="{escape(render_html(self))}" width="100%" height="760" frameborder="0"></iframe>'


def build_preview(datamodule: ChatDataModule, split: Split = "train", rows: int = 3) -> Preview:
    """Preview a split of a data module after its setup, with its first few documents."""
    prepared, plan = datamodule.prepared[split], datamodule.plans[split]
    first = np.sort(plan.documents)[:rows].tolist()
    lengths = prepared.lengths()[plan.documents]
    samples = [
        (f"{origin.place}{_note(document, side)}{_own_id(origin)}", _segments(side, datamodule.tokenizer))
        for origin, document in zip(prepared.origins(first), prepared.documents(first), strict=True)
        for side in document.sides()
    ]
    return Preview(_facts(datamodule, split), _histogram(lengths), samples)


def _own_id(origin: Origin) -> str:
    """The own id of a row, such as that of a conversation in a table."""
    return "" if origin.id is None else f" (id {origin.id})"


def _note(document: Document, side: Document) -> str:
    """Which side of a pair this is, or what its label says."""
    if document.kind == "pair":
        return ": chosen" if side.preferred else ": rejected"
    return "" if side.preferred is None else f": label {str(side.preferred).lower()}"


def _segments(document: Document, tokenizer: PreTrainedTokenizerFast) -> list[Segment]:
    trained = np.zeros(len(document.input_ids), dtype=bool)
    for first, end in document.spans.reshape(-1, 2).tolist():
        trained[max(first, 1) : end] = True
    return segments(document.input_ids.tolist(), trained.tolist(), tokenizer)


def render_terminal(preview: Preview, *, show_ids: bool = False, brackets: bool = False) -> RenderableType:
    """Render a preview for rich to print: trained text is green, special tokens are visible.

    Args:
        show_ids: Whether token ids follow the text.
        brackets: Whether trained text is in brackets, for output without colours.
    """
    facts = Table.grid(padding=(0, 2))
    for name, value in preview.facts.items():
        facts.add_row(Text(name, "dim"), Text(value))  # Text: a file's name may hold square brackets
    highest = max(count for _, count in preview.histogram)
    bars = Table.grid(padding=(0, 1))
    for start, count in preview.histogram:
        bar = "█" * round(_BAR_WIDTH * count / highest) or "▏" * (count > 0)
        bars.add_row(Text(str(start), "dim"), bar, str(count))
    panels = [
        Panel(_styled_text(document, show_ids, brackets), title=Text(place), title_align="left", border_style="dim")
        for place, document in preview.samples
    ]
    return Group(*panels, facts, Text("\ntokens  documents", "dim"), bars)


def render_html(preview: Preview, *, show_ids: bool = False) -> str:
    """Render a preview as one HTML file that needs nothing else."""
    return render("preview.html", preview=preview, show_ids=show_ids)


def _facts(datamodule: ChatDataModule, split: Split) -> dict[str, str]:
    prepared, plan, options = datamodule.prepared[split], datamodule.plans[split], datamodule.options
    statistics = prepared.statistics
    lengths = prepared.lengths()[plan.documents]
    rows, places = len(plan.rows) - 1, prepared.dropped_places()
    quantiles = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 0.95, 1]).astype(int)
    spans = int(np.diff(np.asarray(prepared.table.data.column("spans").combine_chunks().offsets)).sum()) // 2
    facts = {
        **prepared.files(),
        "rows read": f"{statistics.read:,}",
        "documents kept": f"{statistics.kept:,}" + (f", {statistics.cut:,} cut" if statistics.cut else ""),
        **{f"dropped: {reason}": f"{statistics.dropped[reason]:,}: {rows}" for reason, rows in places.items()},
        **({"empty answers": f"{statistics.empty:,}: such rows teach to say nothing"} if statistics.empty else {}),
        **({"fields not used": unused} if (unused := name_unused(statistics.unused)) else {}),
        f"documents in {split}": f"{len(lengths):,}",
        **preference_facts(prepared, plan.documents),
        **_copies(datamodule, split),
        "tokens": f"{statistics.tokens:,}",
        "trained tokens": f"{statistics.supervised_tokens:,} ({statistics.supervised_tokens / statistics.tokens:.1%})",
        "trained turns": f"{spans:,}",
        "tokens of a document": "min {}, 25% {}, median {}, 75% {}, 95% {}, max {}".format(*quantiles),
        "rows of an epoch": f"{rows:,}",
    }
    if options.packing:
        capacity = row_capacity(options, statistics.kind)
        facts["packing"] = f"{lengths.sum() / (rows * capacity):.1%} of each row of {capacity} used"
    return facts | {"micro-batches of an epoch": f"{len(plan):,}, before accumulation and on one device"}


def _copies(datamodule: ChatDataModule, split: Split) -> dict[str, str]:
    """The duplicates within the training data, and the held-out documents that are training data too, if any."""
    parts = {name: Part(datamodule.prepared[name], np.sort(plan.documents)) for name, plan in datamodule.plans.items()}
    copies = {"exact duplicates": repeated(parts[split])} if split == "train" else {}
    for name in ("val", "test"):
        if name in parts and "train" in parts and split in {"train", name}:
            copies[f"documents of {name} that are trained too"] = shared(parts[name], parts["train"])
    return {name: str(documents) for name, documents in copies.items() if documents.count}


def _histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    counts, edges = np.histogram(lengths, bins=min(_BARS, int(np.ptp(lengths)) + 1))
    return list(zip(np.ceil(edges[:-1]).astype(int).tolist(), counts.tolist(), strict=True))


def _styled_text(document: list[Segment], show_ids: bool, brackets: bool) -> Text:
    text = Text()
    for trained, group in groupby(document, key=lambda segment: segment.trained):
        text.append("«" * (trained and brackets))
        for segment in group:
            text.append(segment.text, "green underline " * segment.trained + "bold magenta" * segment.special)
            if show_ids:
                text.append(f" {segment.ids} ", "dim")
        text.append("»" * (trained and brackets))
    return text
