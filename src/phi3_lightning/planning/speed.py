"""Seconds of a micro-batch: by arithmetic, and by a few layers of the model's shapes that are really run."""

import time
from itertools import chain
from statistics import median

import torch

from phi3_lightning.callbacks.flops import step_flops
from phi3_lightning.model.checkpointing import Way, checkpoint_activations, recomputed_share
from phi3_lightning.module import Phi3LoRAModule
from phi3_lightning.planning.step import Shape, take_step, without_values

LAYERS = (1, 3)
"""Layers of the two models that are timed. All others take what one of them takes."""
ENOUGH = 1024
"""Tokens that are timed at the most; the rest takes as long a token."""
BUDGET = 1.0
"""Seconds that the products of a timed step may take at the device's peak, which decides how many tokens are timed."""
FEWEST = 64
"""Tokens that are timed at the least."""
SOME_TIME = 0.5
"""Seconds for which a model is timed, or one step where that takes longer."""


def least_seconds(module: Phi3LoRAModule, shape: Shape, peak: float) -> float:
    """Return the time that a micro-batch takes on one device if products with weights were all, at the device's peak.

    Args:
        module: With its adapter.
        shape: The size of the micro-batch.
        peak: Operations a second of the device.
    """
    flops = step_flops(module)
    return (flops.per_token * shape.tokens + flops.per_supervised_token * shape.supervised) / peak


def timed_seconds(
    configured: Phi3LoRAModule,
    way: Way | int,
    depth: int,
    shape: Shape,
    *,
    mixed: bool,
    device: str,
    peak: float | None,
) -> float:
    """Return the time of a micro-batch on one device, from that of shallow models without weights of the base.

    Args:
        configured: The module as it is configured, not loaded.
        way: What is computed again in the backward pass; what ``offload`` copies takes no time here.
        depth: Decoder layers of its base, which carry the same adapter each.
        shape: The size of the micro-batch.
        mixed: Whether the Trainer's precision is a mixed one, in 16 bits.
        device: Type of the device.
        peak: Operations a second of the device; None: unknown.
    """
    module = without_values(configured, layers=max(LAYERS))
    model = module.loaded_model
    model.to_empty(device=device)
    model.tie_weights()
    module.to(device)
    with torch.no_grad():
        for tensor in chain(model.parameters(), model.buffers()):
            tensor.fill_(0.01)  # not zero, nor what memory held: some values are slow
    tokens = ENOUGH if peak is None else int(BUDGET * peak / step_flops(module).per_token)
    part = _part(shape, min(max(tokens, FEWEST), ENOUGH))
    share = recomputed_share(way, depth)
    ways: dict[Way, float] = {"none": 1 - share, "full": share} if isinstance(way, int) else {way: 1.0}
    seconds = sum(part_of * _extrapolated(module, one, depth, part, mixed, device) for one, part_of in ways.items())
    return seconds * shape.tokens / part.tokens


def _extrapolated(module: Phi3LoRAModule, way: Way, depth: int, part: Shape, mixed: bool, device: str) -> float:
    """Seconds of ``depth`` layers, of which a few are run."""
    few, more = LAYERS
    model = module.loaded_model
    checkpoint_activations(model, "full" if way == "offload" else way)
    seconds = {}
    take_step(module, part, mixed=mixed, device=device)  # warms up
    for model.config.num_hidden_layers in (more, few):
        seconds[model.config.num_hidden_layers] = _timed(module, part, mixed, device)
    layer = max(seconds[more] - seconds[few], 0) / (more - few)
    return seconds[few] + (depth - few) * layer


def _part(shape: Shape, tokens: int) -> Shape:
    """The first tokens of a micro-batch, in one row."""
    row: list[int] = []
    for length in chain.from_iterable(shape.lengths):
        row.append(min(length, tokens - sum(row)))
        if sum(row) == tokens:
            break
    return Shape([row], max(shape.supervised * sum(row) // shape.tokens, 1))


def _timed(module: Phi3LoRAModule, shape: Shape, mixed: bool, device: str) -> float:
    seconds: list[float] = []
    while sum(seconds) < SOME_TIME:
        start = time.perf_counter()
        take_step(module, shape, mixed=mixed, device=device)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds)
