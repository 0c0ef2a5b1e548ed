"""From options to the documents of each split."""

import os
from dataclasses import replace

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from phi3_lightning.config.data import DataConfig, Split
from phi3_lightning.data.context_length import ContextLength, read_context_length
from phi3_lightning.data.encode import Encoder
from phi3_lightning.data.fields import name_unused
from phi3_lightning.data.packing import Ints, sample_mixture
from phi3_lightning.data.prepare import prepare
from phi3_lightning.data.sources import select_sources
from phi3_lightning.data.template import ChatTemplate, load_tokenizer
from phi3_lightning.data.tokenized import TokenizedDataset
from phi3_lightning.errors import ConfigError, DataError


def model_context_length(options: DataConfig) -> ContextLength | None:
    """Return how long the model's inputs may be; None where no file tells.

    Raises:
        ConfigError: If ``max_length`` is longer.
    """
    if options.tokenizer is None:
        return None
    context_length = read_context_length(options.tokenizer, options.revision)
    if context_length is not None and options.max_length > context_length.longest:
        raise ConfigError(
            f"data.max_length: {options.max_length} is beyond the {context_length.longest} tokens that "
            f"{options.tokenizer} can read; give {context_length.longest} or less"
        )
    return context_length


def load_template(options: DataConfig) -> ChatTemplate:
    """Load tokenizer and chat template.

    Raises:
        ConfigError: If no tokenizer is given, or it cannot be used.
    """
    if options.tokenizer is None:
        raise ConfigError("data.tokenizer: not given; name the folder or hub id of the model's tokenizer")
    tokenizer = load_tokenizer(options.tokenizer, options.revision, options.chat_template)
    return ChatTemplate(tokenizer, options.special_text)


def make_encoder(
    split: Split, options: DataConfig, template: ChatTemplate, context_length: ContextLength | None
) -> Encoder:
    """Return the encoder of a split's rows. Prompts may be as long as the model's context length."""
    prompts = split == "predict"
    limit = context_length.longest if prompts and context_length is not None else options.max_length
    group_by = options.group_by if split == "train" else None  # no other rows are distributed
    return Encoder(template, options.row_options(max_length=limit, group_by=group_by), prompts=prompts)


def prepare_split(split: Split, options: DataConfig, encoder: Encoder) -> TokenizedDataset:
    """Tokenise a split, or find it in the cache."""
    sources = select_sources(options.files(split) or [], split)
    prepared = prepare(
        sources.sources,
        encoder,
        on_bad_row=options.on_bad_row,
        cache_dir=options.cache_dir,
        num_proc=options.num_proc,
    )
    return replace(prepared, left_out=sources.left_out)


def report_rows(split: Split, prepared: TokenizedDataset) -> None:
    """Log which files were read, what became of their rows, and which fields nothing uses."""
    for name, files in prepared.files().items():
        rank_zero_info(f"{split}: {name}: {files}")
    rank_zero_info(f"{split}: {prepared.statistics}")
    for reason, rows in prepared.dropped_places().items():
        rank_zero_info(f"{split}: dropped, {reason}: {rows}")
    if unused := name_unused(prepared.statistics.unused):
        rank_zero_info(f"{split}: fields that are not used: {unused}")


def describe_tested(options: DataConfig) -> str:
    """Return where the rows that ``test`` measures come from."""
    if options.tested == "test":
        return f"data.test: {options.test}"
    return "the validation data, since data.test is not given; the best checkpoint was chosen by them"


def share_out(split: Split, prepared: TokenizedDataset, options: DataConfig, seed: int) -> dict[Split, Ints]:
    """Distribute the documents of a prepared split, by the seed: training documents may be mixed, and some validate.

    Raises:
        DataError: If a source of the mixture has no documents, or all documents are of one group.
    """
    documents = np.arange(len(prepared.table))
    if split != "train":
        return {split: documents}
    if options.mixture is not None:
        documents = sample_mixture(prepared.items(), options.mixture, seed)
        if not len(documents):
            raise DataError("data.mixture: no row is left of one of data.train; fix it, or leave it out")
    if options.val is not None or options.val_fraction == 0 or len(documents) < 2:
        return {split: documents}
    size = min(max(round(len(documents) * options.val_fraction), 1), len(documents) - 1)
    if options.group_by is not None:
        held_out = choose_groups(prepared.column("group")[documents], size, seed)
        return {"train": documents[~held_out], "val": documents[held_out]}
    shuffled = np.random.default_rng(seed).permutation(documents)
    return {"train": np.sort(shuffled[size:]), "val": np.sort(shuffled[:size])}


def choose_groups(groups: Ints, size: int, seed: int) -> NDArray[np.bool_]:
    """Choose whole groups at random that together have at most ``size`` documents, or else the smallest group.

    Returns:
        Whether each document is chosen, by the ``groups`` of all documents, both of shape (documents,).

    Raises:
        DataError: If there is only one group.
    """
    names, counts = np.unique(groups, return_counts=True)
    if len(names) < 2:
        raise DataError("data.group_by: all rows are of one group, so none can validate; give data.val, or no group")
    order = np.random.default_rng(seed).permutation(len(names))
    chosen: list[int] = []
    for group in order.tolist():
        if counts[group] <= size:
            chosen.append(group)
            size -= int(counts[group])
    return np.isin(groups, names[chosen or [int(order[counts[order].argmin()])]])


def data_seed(options: DataConfig) -> int:
    """Return the seed of split, mixture and order."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if options.seed is None else int(options.seed)
