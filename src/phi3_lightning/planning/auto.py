"""The settings that are ``auto``: what fits into the device's memory."""

import math
from dataclasses import replace

from phi3_lightning.errors import ConfigError
from phi3_lightning.model.activation_checkpointing import CheckpointingMode
from phi3_lightning.model.document_attention import MAX_SAVED_KEYS
from phi3_lightning.model.loss import GPU_CHUNK
from phi3_lightning.planning.memory import CPU_PROCESS_BYTES, FIRST_STEP_LIBRARY_BYTES, Memory, MemoryPredictor
from phi3_lightning.planning.spec import RunSpec
from phi3_lightning.planning.step import BatchShape

PLANNED_SHARE_OF_MEMORY = 0.85
"""Predictions are within a tenth on a CPU, and others use the machine too."""

MODES_ON_CPU: list[CheckpointingMode | int] = ["none", 4, "selective", "full"]
"""Checkpointing modes, the fastest first. On Phi-3-mini's shapes ``selective`` costs a CPU half the time of 2, and less
memory."""
MODES_ON_GPU: list[CheckpointingMode | int] = ["none", 4, 2, "full"]
"""The same for a GPU, where ``selective``, whose bookkeeping by operator is Python, was not measured."""

MAX_ROWS = 4096
"""Rows of a micro-batch at the most."""
MAX_VALIDATION_TOKENS = 2**15
"""Tokens of a validation's micro-batch at the most: they fill any GPU, and keep tensors below 2^31 elements."""
PARTS_THAT_GROW_WITH_ROWS = ("stored", "head", "layer", "reference", "fragmentation")


def fastest_mode(predictor: MemoryPredictor, shape: BatchShape, room: float) -> tuple[CheckpointingMode | int, str]:
    """Return the fastest checkpointing mode that fits, or the leanest where none does, and the reason in words.

    ``room`` is the bytes for the largest micro-batch, besides base and process.
    """
    where = f"of {max(room, 0.0) / 1e9:.1f} GB of memory"
    if (bound := upper_bound(predictor.spec, shape)) <= room:
        return "none", f"the largest batch takes less than {bound / 1e9:.1f} {where}"
    modes = _modes(predictor.spec)
    for mode in modes:
        memory = predictor.memory(shape, mode)
        needed = memory.total - memory.base - memory.process
        if needed <= room:
            return mode, f"the largest batch takes {needed / 1e9:.1f} {where}"
    return modes[-1], f"the largest batch takes {needed / 1e9:.1f} {where}; it may not fit"


def _modes(spec: RunSpec) -> list[CheckpointingMode | int]:
    return MODES_ON_GPU if spec.on_gpu else MODES_ON_CPU


def upper_bound(spec: RunSpec, shape: BatchShape) -> float:
    """Return more bytes than a micro-batch can need with nothing recomputed, without a dry run, which takes seconds."""
    if spec.attn_implementation not in ("auto", "documents", "flash_attention_2"):
        return math.inf  # masks and weights over whole rows
    config = spec.config
    rank = max([spec.lora.r, *spec.lora.rank_pattern.values()])
    width = config.hidden_size + config.intermediate_size
    probabilities = MAX_SAVED_KEYS * config.num_attention_heads  # of attention, which longer documents do not save
    layer = 16 * config.hidden_size + 12 * config.intermediate_size + probabilities + 32 * rank
    head = 4 * GPU_CHUNK * config.vocab_size + 4 * shape.tokens * config.hidden_size
    adapter = 4 * config.num_hidden_layers * 8 * rank * width
    whole = 4 * len(spec.lora.modules_to_save or []) * config.vocab_size * config.hidden_size
    layers = config.num_hidden_layers + bool(spec.objective.extra_forward_passes)
    values = shape.tokens * layers * layer + head + (adapter + whole) * (2 if spec.copies_adapter else 1)
    return FIRST_STEP_LIBRARY_BYTES + 1.5 * 4 * values


def rows_that_fit(spec: RunSpec, shape: BatchShape, room: float) -> tuple[int, CheckpointingMode | int]:
    """Return how many rows of a size make a micro-batch that fits, and the checkpointing mode for which that holds.

    Where the mode is ``auto``, it is the fastest with which one row fits. A CPU's process counts as a round figure, so
    that a resumed run gets the same rows. ``room`` is the bytes of the whole run.

    Raises:
        ConfigError: If not even one row fits.
    """
    predictor = MemoryPredictor(spec if spec.on_gpu else replace(spec, process=CPU_PROCESS_BYTES))
    for mode in _modes(spec) if spec.gradient_checkpointing == "auto" else [spec.mode]:
        if (needed := predictor.memory(shape, mode).total) > room:
            continue
        two, three = (predictor.memory(shape.times(rows), mode) for rows in (2, 3))
        return _most_rows(two, three, room), mode
    raise ConfigError(
        f"data.max_tokens_per_batch: auto finds no size that fits: one row of {shape.tokens} tokens takes "
        f"{needed / 1e9:.1f} GB of {room / 1e9:.1f} GB; lower data.max_length, or see what plan says would help"
    )


def tokens_that_validate(spec: RunSpec, shape: BatchShape, room: float) -> int:
    """Return how many tokens of such rows make a micro-batch that fits in validation, 32,768 at the most.

    ``room`` is the bytes of the whole run.
    """
    predictor = MemoryPredictor(spec)
    two, three = (predictor.validation_memory(shape.times(rows)) for rows in (2, 3))
    return min(_most_rows(two, three, room) * shape.tokens, MAX_VALIDATION_TOKENS)


def _most_rows(two: Memory, three: Memory, room: float) -> int:
    rows = 1
    while rows < MAX_ROWS and _with_rows(two, three, rows + 1).total <= room:
        rows += 1
    return rows


def _with_rows(two: Memory, three: Memory, rows: int) -> Memory:
    """The memory of a number of rows: from the second on each part grows by the same."""
    parts = {
        name: getattr(two, name) + (rows - 2) * (getattr(three, name) - getattr(two, name))
        for name in PARTS_THAT_GROW_WITH_ROWS
    }
    return replace(two, **parts)


def share_step(rows: int, max_rows: int) -> tuple[int, int]:
    """Return the fewest micro-batches of one size that hold the rows of an optimiser step, and the rows of each."""
    micro_batches = -(-rows // max_rows)
    return micro_batches, -(-rows // micro_batches)
