"""All checks in their order, so that each fault shows in one line of the table and not in all that follow."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from phi3_lightning.checks import numerics
from phi3_lightning.checks.overfit_diagnosis import OverfitDiagnosis
from phi3_lightning.checks.result import Result
from phi3_lightning.checks.rows import SAMPLED_ROWS, Row, Sample, packaged_rows, read_sample
from phi3_lightning.checks.shared_base import SharedBase
from phi3_lightning.checks.supervision import find_faults
from phi3_lightning.config.data import DataConfig, Split
from phi3_lightning.data.collate import collate, pad_id
from phi3_lightning.data.conversation import Conversation, TokenizedDocument
from phi3_lightning.data.copies import Part, repeated, shared
from phi3_lightning.data.plans import plan_split
from phi3_lightning.data.splits import (
    data_seed,
    load_template,
    make_encoder,
    model_context_length,
    prepare_split,
    share_out,
)
from phi3_lightning.errors import DataError
from phi3_lightning.hardware import program
from phi3_lightning.preferences import learns_from

MY_ROWS = "my rows"
REPEATED_ROWS = "rows that are there twice"
HELD_OUT = "no held-out row is trained"
TEMPLATE = "mask = template"
PACKED = "packed = unpacked"
CHECKPOINTING = "gradient checkpointing on = off"
GRADIENTS = "every adapter gets a gradient"
EIGHT_BITS = "gradient in 8 bits"

MAX_GRADIENT_ERROR = 0.25
"""Relative error of the gradient in 8 bits, with which its direction still has a cosine of 0.97."""
MIN_USABLE_FRACTION = 0.5
"""Fraction of the rows that training has to use, and of those the fraction that must have an answer and its end."""


@dataclass
class Suite:
    """The checks of one configuration."""

    options: DataConfig
    """The section ``data``."""
    shared_base: SharedBase
    """Has the section ``model``."""
    clip: float | None
    """The Trainer's ``gradient_clip_val``."""
    folder: Path
    """For temporary files."""
    on_begin: Callable[[str], None]
    """Called with the name of each check."""
    on_step: Callable[[], None]
    """Called after each optimiser step."""

    def __post_init__(self) -> None:
        self.context_length = model_context_length(self.options)
        self.template = load_template(self.options)
        self.pad = pad_id(self.template.tokenizer)

    def run(self) -> Iterator[Result]:
        """Yield the results, one after the other.

        Raises:
            DataError: If a file cannot be read.
        """
        self.on_begin(MY_ROWS)
        kind = learns_from(self.shared_base.objective)
        sample, good = read_sample(self.options, self.template, self.context_length), packaged_rows(self.template, kind)
        first_rows = self._my_rows(sample)
        yield first_rows
        self.on_begin(REPEATED_ROWS)
        yield from self._copies(known_fault=first_rows.outcome == "FAIL")
        self.on_begin(TEMPLATE)
        yield self._template(sample.rows)
        yield from self._numerics(sample.rows or good)
        diagnosis = OverfitDiagnosis(
            self.shared_base, self.template, self.clip, self.folder, self.on_begin, self.on_step
        )
        own = diagnosis.case(sample.rows, self._planned(sample.rows)) if sample.rows else None
        # KTO compares the answers of a micro-batch
        size = self.options.batch_size if kind != "labelled" else len(good)
        indices = [[index] for index in range(len(good))]
        batches = [indices[start : start + size] for start in range(0, len(good), size)]
        yield from diagnosis.run(own, diagnosis.case(good, batches))

    def _planned(self, rows: list[Row]) -> list[list[list[int]]]:
        """The rows in batches, as a run would lay them out."""
        lengths = np.array([len(row.document.input_ids) for row in rows], dtype=np.int64)
        chosen = np.array([row.document.chosen_length for row in rows], dtype=np.int64)
        pairs = chosen if chosen.any() else None
        plan = plan_split("train", lengths, self.options, self.context_length, seed=0, chosen_lengths=pairs)
        return [plan[batch] for batch in range(len(plan))]

    def _my_rows(self, sample: Sample) -> Result:
        trained = f", {sample.supervised / sample.tokens:.0%} of their tokens trained" if sample.tokens else ""
        figure = f"of the first {sample.read} rows {sample.documents} are kept{trained}"
        figure += "".join(f"; {count} dropped ({reason})" for reason, count in sample.dropped.items())
        look = f"look at them: {program()} preview with the same options"
        remedy = f"{look}; messages with weight 0 or train false are not trained, nor rows longer than data.max_length"
        one_sided = len(sample.labels) == 1 and sample.read < SAMPLED_ROWS  # of more rows, others may follow
        if sample.labels:
            figure += f"; {sample.labels[True]} good answers and {sample.labels[False]} bad ones"
        refused = bool(sample.bad) and self.options.on_bad_row == "raise"
        if refused:
            remedy = f"fix {sample.bad[0]}, or set data.on_bad_row: skip"
        elif sample.endless:
            figure += f"; {sample.endless} without an end of turn that is trained"
            remedy = "answers that are cut teach no end: raise data.max_length, or set data.truncation: drop"
        elif sample.empty:
            figure += f"; {sample.empty} with empty answers"
            remedy = f"{look}; an empty answer teaches to say nothing"
        elif one_sided:
            remedy = "kto learns from what sets good answers apart from bad ones: give rows of both labels"
        unusable = sample.endless + sample.empty > (1 - MIN_USABLE_FRACTION) * sample.documents
        enough = sample.documents >= MIN_USABLE_FRACTION * sample.read
        holds = bool(sample.rows) and not refused and not unusable and enough and not one_sided
        return Result.of(MY_ROWS, holds, figure, remedy)

    def _copies(self, *, known_fault: bool) -> Iterator[Result]:
        """Look for repeated rows, among all that would be trained, and in what is held out."""
        if self.options.streaming:
            yield from (Result.skipped(name, "a stream has no end") for name in (REPEATED_ROWS, HELD_OUT))
            return
        try:
            parts = self._parts()
        except DataError as error:
            if known_fault:
                yield Result.skipped(REPEATED_ROWS, f"the fault of {MY_ROWS!r} comes first")
            else:  # in rows behind those of the sample
                yield Result.of(REPEATED_ROWS, False, str(error), "fix or leave out what is named there")
            yield Result.skipped(HELD_OUT, "not all rows can be read")
            return
        train = parts.pop("train")
        figure = f"{len(train.documents):,} documents are trained, copies {repeated(train)}"
        yield Result.of(REPEATED_ROWS, True, figure, "")
        leaks = {name: shared(part, train) for name, part in parts.items()}
        figure = "; ".join(f"of {len(parts[name].documents):,} in {name} {leak}" for name, leak in leaks.items())
        remedy = (
            "a loss on rows that are trained says nothing: take them out of one of the two; where val_fraction chose "
            "them, remove copies from data.train, or set data.group_by to a column that copies share"
        )
        sound = all(leak.count == 0 for leak in leaks.values())
        yield Result.of(HELD_OUT, sound, figure, remedy) if leaks else Result.skipped(HELD_OUT, "nothing is held out")

    def _parts(self) -> dict[Split, Part]:
        """The documents of each split, as ``fit`` would have them; ``check`` leaves nothing in the cache."""
        options = replace(self.options, cache_dir=str(self.folder))
        parts: dict[Split, Part] = {}
        for split in ("train", "val", "test"):
            if self.options.files(split) is not None:
                encoder = make_encoder(split, options, self.template, self.context_length)
                prepared = prepare_split(split, options, encoder)
                shares = share_out(split, prepared, self.options, data_seed(self.options))
                parts |= {name: Part(prepared, documents) for name, documents in shares.items()}
        return parts

    def _template(self, rows: list[Row]) -> Result:
        chats = [row for row in rows if row.conversations and all(map(self._whole, row.conversations))]
        if not chats:
            return Result.skipped(TEMPLATE, "no whole rows with turns" if rows else "no rows of yours to look at")
        faults = find_faults(chats, self.template)
        figure = faults[0] if faults else f"{len(chats)} rows: tokens, trained parts and prompts agree"
        remedy = (
            "the template writes another text for training than for generation: take the base's own "
            "(data.chat_template: null), or fix the part behind add_generation_prompt"
        )
        return Result.of(TEMPLATE, not faults, figure, remedy)

    def _whole(self, chat: Conversation) -> bool:
        """Whether nothing was cut off."""
        [encoded] = self.template.encode([chat])
        return isinstance(encoded, TokenizedDocument) and len(encoded.input_ids) <= self.options.max_length

    def _numerics(self, rows: list[Row]) -> Iterator[Result]:
        documents = [row.document for row in rows]
        packed = collate([documents], self.pad)
        single = collate([[side] for document in documents for side in document.sides()], self.pad)
        if "shared_lengths" in packed:  # each answer of a pair with a prompt of its own
            single["shared_lengths"] = [[0] for _ in single["document_ids"]]
        single, packed = map(self.shared_base.strategy.batch_to_device, (single, packed))
        with self.shared_base.module() as module:
            numerics.leave_no_half_zero(module)
            module.to(self.shared_base.strategy.root_device)
            context = partial(self.shared_base.context, module)
            self.on_begin(PACKED)
            yield _near(
                PACKED,
                numerics.packed_against_single(module, packed, single, context),
                "documents of a row see each other: set data.packing: false, or another model.attn_implementation",
            )
            self.on_begin(CHECKPOINTING)
            yield _near(
                CHECKPOINTING,
                numerics.checkpointed_against_stored(module, single, context),
                "set model.gradient_checkpointing: none, and update torch and transformers",
            )
            self.on_begin(GRADIENTS)
            yield self._gradients(*numerics.without_gradient(module, single, context))
            if module.quantization == "int8_dynamic":
                self.on_begin(EIGHT_BITS)
                yield _of_8_bits(*numerics.gradient_error_of_8_bits(module, single, context))

    def _gradients(self, count: int, without: list[str]) -> Result:
        figure = f"{count} layers or slices, all of them"
        if without:
            more = f" and {len(without) - 3} more" if len(without) > 3 else ""
            figure = f"{len(without)} of {count} get none: {', '.join(without[:3])}{more}"
        remedy = (
            "something freezes them, or cuts the graph before them: check model.lora.target_modules and quantization"
        )
        return Result.of(GRADIENTS, not without, figure, remedy)


def _of_8_bits(error: float, cosine: float) -> Result:
    figure = f"{error:.1%} off that of exact products with the same weights (limit {MAX_GRADIENT_ERROR:.0%}), "
    figure += f"cosine {cosine:.5f}"
    remedy = "activations or gradients of this base do not fit into 8 bits: leave model.quantization null"
    return Result.of(EIGHT_BITS, error <= MAX_GRADIENT_ERROR, figure, remedy)


def _near(name: str, distances: dict[str, float], remedy: str) -> Result:
    figure = ", ".join(f"{what} {distance:.2g}" for what, distance in distances.items())
    holds = all(distance <= numerics.MAX_ROUNDINGS for distance in distances.values())  # not where one is NaN
    return Result.of(name, holds, f"{figure} roundings a layer (limit {numerics.MAX_ROUNDINGS:g})", remedy)
