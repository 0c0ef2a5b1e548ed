"""What fits into the memory that there is: the settings that are ``auto``."""

import math
from dataclasses import replace
from typing import cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from phi3_lightning.batch import Batch, PlannedData
from phi3_lightning.errors import ConfigError
from phi3_lightning.model.checkpointing import Way
from phi3_lightning.model.documents import SHORT
from phi3_lightning.model.loss import GPU_CHUNK
from phi3_lightning.module import Phi3LoRAModule
from phi3_lightning.planning.memory import LOADED, Memory, Setup
from phi3_lightning.planning.step import Shape
from phi3_lightning.platform import device_memory

USED = 0.85
"""Share of the memory that is planned: predictions are within a tenth on a CPU, and others use the machine too."""

WAYS: dict[str, list[Way | int]] = {"cpu": ["none", 4, "selective", "full"], "cuda": ["none", 4, 2, "full"]}
"""Ways to keep activations by type of device, the fastest first. On Phi-3-mini's shapes ``selective`` costs a CPU half
the time of 2, and less memory; on a GPU its bookkeeping by operator, which is Python, was not measured."""

MOST = 4096
"""Rows at the most."""
PARTS = ("kept", "head", "layer", "holes")
"""What grows with rows."""


def choose_checkpointing(trainer: pl.Trainer, module: Phi3LoRAModule) -> tuple[Way | int, str]:
    """Return the fastest way to keep activations with which the largest training batch fits, the same on all ranks.

    Args:
        trainer: The run's, when a fit begins.
        module: Its module, with its model on the device.

    Returns:
        The way, and why, in words.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning types it as None
    batch = data.largest_train_batch() if isinstance(data, PlannedData) else None
    if batch is None:
        return "full", "the largest batch is not known before training"
    setup, shape = Setup.of(trainer, module), Shape.of(batch)
    free, _ = _memory(trainer)
    return fastest(setup, shape, USED * free)


def fastest(setup: Setup, shape: Shape, room: float) -> tuple[Way | int, str]:
    """Return the fastest way to keep activations that fits, or the leanest where none does.

    Args:
        setup: The run.
        shape: Its largest micro-batch.
        room: Bytes that it may take beside its base and its process.

    Returns:
        The way, and why, in words.
    """
    where = f"of {room / 1e9:.1f} GB of memory"
    if (most := upper_bound(setup.module, shape)) <= room:
        return "none", f"the largest batch takes less than {most / 1e9:.1f} {where}"
    ways = WAYS["cuda" if setup.process is None else "cpu"]
    for way in ways:
        memory = setup.memory(shape, way)
        needed = memory.total - memory.base - memory.process
        if needed <= room:
            return way, f"the largest batch takes {needed / 1e9:.1f} {where}"
    return ways[-1], f"the largest batch takes {needed / 1e9:.1f} {where}; it may not fit, and plan says what helps"


def upper_bound(module: Phi3LoRAModule, shape: Shape) -> float:
    """Return more bytes than a micro-batch can need with everything kept, without a dry run, which takes seconds.

    Args:
        module: The module, loaded or not.
        shape: The size of the micro-batch.
    """
    if module.attn_implementation not in ("auto", "documents", "flash_attention_2"):
        return math.inf  # masks and weights over whole rows
    config = module.base_config()
    rank = max([module.lora.r, *module.lora.rank_pattern.values()])
    width = config.hidden_size + config.intermediate_size
    weights = SHORT * config.num_attention_heads  # of attention, which longer documents do not keep
    layer = 16 * config.hidden_size + 12 * config.intermediate_size + 4 * weights + 32 * rank
    head = 4 * GPU_CHUNK * config.vocab_size + 4 * shape.tokens * config.hidden_size
    adapter = 4 * config.num_hidden_layers * 8 * rank * width
    whole = 4 * len(module.lora.modules_to_save or []) * config.vocab_size * config.hidden_size
    return LOADED + 1.5 * 4 * (shape.tokens * config.num_hidden_layers * layer + head + adapter + whole)


def rows_that_fit(trainer: pl.Trainer, module: Phi3LoRAModule, row: Batch) -> int:
    """Return how many rows like the given one make a micro-batch that fits, the same on all ranks.

    It goes by all of the device's memory and not by what is free now: a run that goes on finds the same batches.

    Args:
        trainer: The run's, while its data are set up.
        module: Its module; nothing is loaded yet.
        row: The largest row of the training data.

    Raises:
        ConfigError: If not even one fits.
    """
    _, total = _memory(trainer)
    rows, way = most_rows(Setup.of(trainer, module).usual(), Shape.of(row), USED * total)
    rank_zero_info(f"{rows} rows fit into {USED:.0%} of {total / 1e9:.1f} GB with gradient_checkpointing {way}")
    return rows


def most_rows(setup: Setup, shape: Shape, room: float) -> tuple[int, Way | int]:
    """Return how many rows of a size fit, and the way to keep activations for which that holds.

    Where that way is ``auto``, it is the fastest with which one row fits.

    Args:
        setup: The run.
        shape: The size of a row.
        room: Bytes that the run may take.

    Raises:
        ConfigError: If not even one fits.
    """
    ways = WAYS["cuda" if setup.process is None else "cpu"]
    for way in ways if setup.module.gradient_checkpointing == "auto" else [setup.way]:
        if (needed := setup.memory(shape, way).total) > room:
            continue
        two, three = (setup.memory(Shape(shape.lengths * rows, shape.supervised * rows), way) for rows in (2, 3))
        rows = 1
        while rows < MOST and _with_rows(two, three, rows + 1).total <= room:
            rows += 1
        return rows, way
    raise ConfigError(
        f"data.max_tokens_per_batch: auto finds no size that fits: one row of {shape.tokens} tokens takes "
        f"{needed / 1e9:.1f} GB of {room / 1e9:.1f} GB; lower data.max_length, or see what plan says would help"
    )


def _with_rows(two: Memory, three: Memory, rows: int) -> Memory:
    """The memory of so many rows: from the second on each part grows by the same."""
    grown = {name: getattr(two, name) + (rows - 2) * (getattr(three, name) - getattr(two, name)) for name in PARTS}
    return replace(two, **grown)


def _memory(trainer: pl.Trainer) -> tuple[float, float]:
    """Bytes that are free, and all, of the rank that has least; ranks on a CPU share them."""
    device = trainer.strategy.root_device
    ranks = trainer.num_devices if device.type == "cpu" else 1
    found = -torch.tensor(device_memory(device), dtype=torch.float64, device=device) / ranks
    free, total = (-cast("torch.Tensor", trainer.strategy.reduce(found, reduce_op="max"))).tolist()
    return free, total
