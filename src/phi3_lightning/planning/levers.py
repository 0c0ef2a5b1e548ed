"""What would make a run smaller, one change at a time."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

from phi3_lightning.errors import ConfigError
from phi3_lightning.model.checkpointing import Way
from phi3_lightning.module import Phi3LoRAModule
from phi3_lightning.planning.memory import Memory, Setup, quantized, sharded
from phi3_lightning.planning.step import Shape
from phi3_lightning.strategy import check_shardable

SHARDS = 8
"""Devices over which FSDP2 is tried where the run has one."""


@dataclass(frozen=True)
class Lever:
    """A change, as the user would write it, and the memory with it."""

    change: str
    memory: Memory


def levers(setup: Setup, shape: Shape, memory: Memory, on_try: Callable[[str], None]) -> list[Lever]:
    """Return the changes that make a run smaller, the most helpful first.

    Args:
        setup: The run.
        shape: Its largest micro-batch.
        memory: Its memory.
        on_try: Told each change before it is tried.
    """
    tried = []
    for change, predict in _changes(setup, shape, memory):
        on_try(change)
        tried.append(Lever(change, predict()))
    return sorted((lever for lever in tried if lever.memory.total < memory.total), key=lambda tried: tried.memory.total)


def _changes(setup: Setup, shape: Shape, memory: Memory) -> Iterator[tuple[str, Callable[[], Memory]]]:
    module = setup.module
    for way in _leaner(setup):
        yield f"model.gradient_checkpointing: {way}", partial(setup.memory, shape, way)
    if len(shape.lengths) > 1:
        yield "data.batch_size: 1", lambda: setup.memory(_longest_row(shape))
    longest = max(map(sum, shape.lengths))
    if longest > 1:
        yield f"data.max_length: {longest // 2}", lambda: setup.memory(_halved(shape))
    if module.quantization is None and not setup.sharded:
        yield "model.quantization: nf4", lambda: quantized(memory, setup.hollow.model, "nf4")
    if module.lora.r > 1:
        half = module.lora.r // 2
        yield f"model.lora.r: {half}", lambda: setup.changed(lora={**asdict(module.lora), "r": half}).memory(shape)
    if not setup.sharded and _shardable(module):
        ranks = setup.ranks if setup.ranks > 1 else SHARDS
        yield f"FSDP2 over {ranks} devices", lambda: sharded(memory, setup.hollow.model, ranks)


def _leaner(setup: Setup) -> list[Way | int]:
    """Ways to recompute more; of the numbers 2 stands for all."""
    if setup.way == "offload":
        return []
    ways: list[Way | int] = ["none", 2, "selective", "full"]
    if setup.process is None:  # on a GPU
        ways.append("offload")
    return ways[1 + (ways.index(setup.way) if setup.way in ways else 0) :]


def _longest_row(shape: Shape) -> Shape:
    longest = max(shape.lengths, key=sum)
    return Shape([longest], shape.supervised * sum(longest) // shape.tokens)


def _halved(shape: Shape) -> Shape:
    """Each row cut in the middle."""
    rows = []
    for row in shape.lengths:
        left, half = -(-sum(row) // 2), []
        for length in row:
            if left > 0:
                half.append(min(length, left))
                left -= length
        rows.append(half)
    return Shape(rows, -(-shape.supervised // 2))


def _shardable(module: Phi3LoRAModule) -> bool:
    try:
        check_shardable(False, module.quantization, module.lora, module.optimizer_config)
    except ConfigError:
        return False
    return True
