"""From options to the documents and batches of each split."""

import os
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from phi3_lightning.config.data import DataConfig, Split
from phi3_lightning.data.context_length import ContextLength, read_context_length
from phi3_lightning.data.encode import Encoder
from phi3_lightning.data.packing import Ints, Plan, plan_batches, sample_mixture
from phi3_lightning.data.prepare import TokenizedDataset, prepare
from phi3_lightning.data.sources import select_sources
from phi3_lightning.data.template import ChatTemplate, load_tokenizer
from phi3_lightning.errors import ConfigError, DataError


def model_context_length(options: DataConfig) -> ContextLength | None:
    """Look up how long the model's inputs may be, and whether ``max_length`` fits.

    Args:
        options: What the user gave.

    Returns:
        The window, or None where nothing says it.

    Raises:
        ConfigError: ``max_length`` is beyond the window.
    """
    if options.tokenizer is None:
        return None
    window = read_context_length(options.tokenizer, options.revision)
    if window is not None and options.max_length > window.longest:
        raise ConfigError(
            f"data.max_length: {options.max_length} is beyond the {window.longest} tokens that {options.tokenizer} can "
            f"read; give {window.longest} or less."
        )
    return window


def load_template(options: DataConfig) -> ChatTemplate:
    """Load tokenizer and chat template.

    Args:
        options: What the user gave.

    Returns:
        The template, with its tokenizer.

    Raises:
        ConfigError: No tokenizer was given, or it cannot be used.
    """
    if options.tokenizer is None:
        raise ConfigError("data.tokenizer: not given; name the folder or hub id of the model's tokenizer.")
    tokenizer = load_tokenizer(options.tokenizer, options.revision, options.chat_template)
    return ChatTemplate(tokenizer, options.special_text)


def make_encoder(split: Split, options: DataConfig, template: ChatTemplate, window: ContextLength | None) -> Encoder:
    """Say how rows of a split become tokens.

    Args:
        split: Which one. Prompts may be as long as the model's window.
        options: What the user gave.
        template: Renders conversations.
        window: How long the model's inputs may be.

    Returns:
        The encoder.
    """
    prompts = split == "predict"
    limit = window.longest if prompts and window is not None else options.max_length
    group_by = options.group_by if split == "train" else None  # no other rows are shared out
    return Encoder(template, options.row_options(max_length=limit, group_by=group_by), prompts=prompts)


def prepare_split(split: Split, options: DataConfig, encoder: Encoder) -> TokenizedDataset:
    """Tokenise a split, or find it in the cache.

    Args:
        split: Which one.
        options: What the user gave.
        encoder: Turns its rows into tokens.

    Returns:
        Its documents.
    """
    sources = select_sources(options.files(split) or [], split)
    prepared = prepare(
        sources.taken,
        encoder,
        on_bad_row=options.on_bad_row,
        cache_dir=options.cache_dir,
        num_proc=options.num_proc,
    )
    return replace(prepared, left_out=sources.left_out)


def share_out(split: Split, prepared: TokenizedDataset, options: DataConfig, seed: int) -> dict[Split, Ints]:
    """Divide documents; those of the training data may be mixed, and shared with validation.

    Args:
        split: Which split was prepared.
        prepared: Its documents.
        options: What the user gave.
        seed: Decides mixture and division.

    Returns:
        The documents of each split that these serve.

    Raises:
        DataError: A source of the mixture has no documents, or all documents are of one group.
    """
    documents = np.arange(len(prepared.table))
    if split != "train":
        return {split: documents}
    if options.mixture is not None:
        documents = sample_mixture(prepared.items(), options.mixture, seed)
        if not len(documents):
            raise DataError("data.mixture: no row is left of one of data.train; mend it, or leave it out.")
    if options.val is not None or options.val_fraction == 0 or len(documents) < 2:
        return {split: documents}
    size = min(max(round(len(documents) * options.val_fraction), 1), len(documents) - 1)
    if options.group_by is not None:
        held_out = choose_groups(prepared.column("group")[documents], size, seed)
        return {"train": documents[~held_out], "val": documents[held_out]}
    mixed = np.random.default_rng(seed).permutation(documents)
    return {"train": np.sort(mixed[size:]), "val": np.sort(mixed[:size])}


def choose_groups(groups: Ints, size: int, seed: int) -> NDArray[np.bool_]:
    """Choose whole groups, in an order by chance, that together have at most a number of documents.

    Args:
        groups: The group of each document, shape (documents,).
        size: Documents to choose; the smallest group is chosen where every group has more.
        seed: Decides which groups.

    Returns:
        Whether each document is chosen, shape (documents,).

    Raises:
        DataError: There is but one group.
    """
    names, counts = np.unique(groups, return_counts=True)
    if len(names) < 2:
        raise DataError("data.group_by: all rows are of one group, so none can validate; give data.val, or no group.")
    order = np.random.default_rng(seed).permutation(len(names))
    chosen: list[int] = []
    for group in order.tolist():
        if counts[group] <= size:
            chosen.append(group)
            size -= int(counts[group])
    return np.isin(groups, names[chosen or [int(order[counts[order].argmin()])]])


def data_seed(options: DataConfig) -> int:
    """Return the seed of split, mixture and order.

    Args:
        options: What the user gave.
    """
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if options.seed is None else int(options.seed)


def plan_split(split: Split, lengths: Ints, options: DataConfig, window: ContextLength | None, seed: int) -> Plan:
    """Lay down the batches of a split.

    Args:
        split: Which one. Training batches are mixed by seed, others go from long to short; prompts are not packed.
        lengths: Tokens of its documents, shape (documents,).
        options: What the user gave.
        window: How long the model's inputs may be.
        seed: Decides which rows share a batch.

    Returns:
        The plan.
    """
    prompts, tokens = split == "predict", options.max_tokens_per_batch
    return plan_batches(
        lengths,
        batch_size=options.predict_batch_size if prompts else options.batch_size,
        max_tokens=tokens if isinstance(tokens, int) and not prompts else None,
        capacity=options.max_length if options.packing and not prompts else None,
        seed=seed if split == "train" else None,
        apart=window.short if window is not None and not prompts else None,
    )


def plan_documents(
    split: Split, prepared: TokenizedDataset, documents: Ints, options: DataConfig, window: ContextLength | None
) -> Plan:
    """Lay down the batches of some documents.

    Args:
        split: Which split they are of.
        prepared: The tokenised set that they belong to.
        documents: Which of it, in order, shape (documents,).
        options: What the user gave.
        window: How long the model's inputs may be.

    Returns:
        The plan, by their indices in the set.
    """
    plan = plan_split(split, prepared.lengths()[documents], options, window, data_seed(options))
    return Plan(documents[plan.documents], plan.rows, plan.batches)
