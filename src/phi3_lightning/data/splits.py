"""From options to the documents and batches of each split."""

import numpy as np

from phi3_lightning.data.encode import Encoder
from phi3_lightning.data.options import Options, Split
from phi3_lightning.data.packing import Ints, Plan, mix, plan_batches
from phi3_lightning.data.prepare import Prepared, prepare
from phi3_lightning.data.sources import find_sources
from phi3_lightning.data.template import ChatTemplate, load_tokenizer
from phi3_lightning.data.window import Window, read_window
from phi3_lightning.errors import ConfigError, DataError


def model_window(options: Options) -> Window | None:
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
    window = read_window(options.tokenizer, options.revision)
    if window is not None and options.max_length > window.longest:
        raise ConfigError(
            f"data.max_length: {options.max_length} is beyond the {window.longest} tokens that {options.tokenizer} can "
            f"read; give {window.longest} or less."
        )
    return window


def load_template(options: Options) -> ChatTemplate:
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


def make_encoder(split: Split, options: Options, template: ChatTemplate, window: Window | None) -> Encoder:
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
    return Encoder(template, options.row_options(max_length=limit), prompts=prompts)


def prepare_split(split: Split, options: Options, encoder: Encoder) -> Prepared:
    """Tokenise a split, or find it in the cache.

    Args:
        split: Which one.
        options: What the user gave.
        encoder: Turns its rows into tokens.

    Returns:
        Its documents.
    """
    return prepare(
        find_sources(options.files(split) or []),
        encoder,
        on_bad_row=options.on_bad_row,
        cache_dir=options.cache_dir,
        num_proc=options.num_proc,
    )


def share_out(split: Split, prepared: Prepared, options: Options, seed: int) -> dict[Split, Ints]:
    """Divide documents; those of the training data may be mixed, and shared with validation.

    Args:
        split: Which split was prepared.
        prepared: Its documents.
        options: What the user gave.
        seed: Decides mixture and division.

    Returns:
        The documents of each split that these serve.

    Raises:
        DataError: A source of the mixture has no documents.
    """
    documents = np.arange(len(prepared.table))
    if split != "train":
        return {split: documents}
    if options.weights is not None:
        documents = mix(prepared.items(), options.weights, seed)
        if not len(documents):
            raise DataError("data.weights: no row is left of one of data.train; mend it, or leave it out.")
    if options.val is not None or options.val_fraction == 0 or len(documents) < 2:
        return {split: documents}
    size = min(max(round(len(documents) * options.val_fraction), 1), len(documents) - 1)
    mixed = np.random.default_rng(seed).permutation(documents)
    return {"train": np.sort(mixed[size:]), "val": np.sort(mixed[:size])}


def plan_split(split: Split, lengths: Ints, options: Options, window: Window | None, seed: int) -> Plan:
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
