"""Changes that would make a run smaller, each by itself."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from phi3_lightning.config import LoRA
from phi3_lightning.distributed.fsdp2 import check_shardable
from phi3_lightning.errors import ConfigError
from phi3_lightning.model.activation_checkpointing import CheckpointingMode
from phi3_lightning.planning.memory import Memory, MemoryPredictor, quantized, sharded
from phi3_lightning.planning.spec import RunSpec
from phi3_lightning.planning.step import BatchShape

FSDP2_DEVICES = 8
"""Devices over which FSDP2 is tried where the run has one."""


@dataclass(frozen=True)
class Suggestion:
    """A change, as the user would write it, and the memory with it."""

    change: str
    memory: Memory


def suggestions(
    predictor: MemoryPredictor, shape: BatchShape, memory: Memory, on_try: Callable[[str], None] = lambda _: None
) -> list[Suggestion]:
    """Return the changes that make a run smaller, the most helpful first; ``on_try`` gets each before it is tried."""
    smaller = []
    for change, predict in _changes(predictor, shape, memory):
        on_try(change)
        if (less := predict()).total < memory.total:
            smaller.append(Suggestion(change, less))
    return sorted(smaller, key=lambda suggestion: suggestion.memory.total)


def _changes(
    predictor: MemoryPredictor, shape: BatchShape, memory: Memory
) -> Iterator[tuple[str, Callable[[], Memory]]]:
    spec = predictor.spec
    for mode in _leaner_modes(spec):
        yield f"model.gradient_checkpointing: {mode}", partial(predictor.memory, shape, mode)
    index = max(range(len(shape.lengths)), key=lambda row: sum(shape.lengths[row]))
    longest = shape.lengths[index]
    length = sum(longest)
    if len(shape.lengths) > 1 and (spec.objective.name != "kto" or len(longest) > 1):  # which needs several answers
        shared = None if shape.shared is None else [shape.shared[index]]
        row = BatchShape([longest], shape.supervised * length // shape.tokens, shared)
        yield "data.batch_size: 1", partial(predictor.memory, row)
    if length > 1:
        side = length if shape.shared is None else length // 2
        yield f"data.max_length: {side // 2}", partial(predictor.memory, _halved(shape))
    if spec.quantization is None and not spec.sharded:
        yield "model.quantization: nf4", partial(quantized, memory, predictor.fake.model, "nf4")
    half = _half_rank(spec.lora)
    if half is not None:
        yield f"model.lora.r: {half.r}", lambda: MemoryPredictor(replace(spec, lora=half)).memory(shape)
    if not spec.sharded and _shardable(spec):
        ranks = spec.ranks if spec.ranks > 1 else FSDP2_DEVICES
        yield f"FSDP2 over {ranks} devices", partial(sharded, memory, predictor.fake.model, ranks)


def _leaner_modes(spec: RunSpec) -> list[CheckpointingMode | int]:
    """Modes that recompute more; of the numbers 2 stands for all."""
    if spec.mode == "offload":
        return []
    modes: list[CheckpointingMode | int] = ["none", 2, "selective", "full"]
    if spec.on_gpu:
        modes.append("offload")
    return modes[1 + (modes.index(spec.mode) if spec.mode in modes else 0) :]


def _half_rank(lora: LoRA) -> LoRA | None:
    """The section with half the rank; None where that is refused, as 0 is, and an odd one of an orthogonal start."""
    try:
        return replace(lora, r=lora.r // 2)
    except ConfigError:
        return None


def _halved(shape: BatchShape) -> BatchShape:
    """Each row cut in the middle, or, of pairs, each document."""
    supervised = -(-shape.supervised // 2)
    if shape.shared is not None:
        lengths = [[-(-length // 2) for length in row] for row in shape.lengths]
        return BatchShape(lengths, supervised, [[length // 2 for length in row] for row in shape.shared])
    rows = []
    for row in shape.lengths:
        left, half = -(-sum(row) // 2), []
        for length in row:
            if left > 0:
                half.append(min(length, left))
                left -= length
        rows.append(half)
    return BatchShape(rows, supervised)


def _shardable(spec: RunSpec) -> bool:
    try:
        check_shardable(False, spec.quantization, spec.lora, spec.optimizer, spec.objective)
    except ConfigError:
        return False
    return True
