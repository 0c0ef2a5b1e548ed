"""Seconds of a micro-batch: by arithmetic, and by a few layers of the model's shapes that are really run."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import chain
from statistics import median

import torch
from transformers import Phi3ForCausalLM

from phi3_lightning.adapters.adapter import Adapter
from phi3_lightning.batch.padding import prompt_batch
from phi3_lightning.config import Generation
from phi3_lightning.generation.decode import generate
from phi3_lightning.model import precision
from phi3_lightning.model.activation_checkpointing import CheckpointingMode, checkpoint_activations, recomputed_share
from phi3_lightning.model.flops import step_flops
from phi3_lightning.planning.spec import RunSpec
from phi3_lightning.planning.step import BatchShape, build_meta_model, take_step

TIMED_LAYERS = (1, 3)
"""Layers of the two models that are timed. All others take what one of them takes."""
MAX_TIMED_TOKENS = 1024
"""Tokens that are timed at the most; the rest takes as long a token."""
MIN_TIMED_TOKENS = 64
"""Tokens that are timed at the least."""
TIMED_STEP_SECONDS = 1.0
"""Seconds that the products of a timed step may take at the device's peak, which decides how many tokens are timed."""
TIMING_SECONDS = 0.5
"""Seconds for which a model is timed, or one step where that takes longer."""
TIMED_NEW_TOKENS = 8
"""Tokens of an answer that are timed; all others take as long."""


def least_seconds(model: Phi3ForCausalLM, spec: RunSpec, shape: BatchShape, peak: float) -> float:
    """Return the time of a micro-batch's products with weights alone, at a peak of operations a second."""
    flops = step_flops(model, spec.objective.extra_forward_passes)
    return (flops.per_token * shape.computed_tokens(spec) + flops.per_supervised_token * shape.supervised) / peak


def timed_seconds(spec: RunSpec, shape: BatchShape, *, device: str, peak: float | None) -> float:
    """Return the time of a micro-batch on one device, from that of shallow models without weights of the base.

    Each layer of the run carries the same adapter; the copies of ``offload`` take no time here. ``peak`` is the
    device's operations a second, if they are known.
    """
    model, adapter = _shallow_model(spec, device)
    flops = step_flops(model, spec.objective.extra_forward_passes)
    tokens = MAX_TIMED_TOKENS if peak is None else int(TIMED_STEP_SECONDS * peak / flops.per_token)
    part = _first_tokens(shape, min(max(tokens, MIN_TIMED_TOKENS), MAX_TIMED_TOKENS))
    depth = spec.config.num_hidden_layers
    step = partial(take_step, model, adapter, spec, part, device=device)
    seconds = partial(_step_seconds, model, step, depth)
    if isinstance(spec.mode, int):
        share = recomputed_share(spec.mode, depth)
        total = (1 - share) * seconds("none") + share * seconds("full")
    else:
        total = seconds(spec.mode)
    return total * shape.computed_tokens(spec) / part.computed_tokens(spec)


def answering_seconds(
    spec: RunSpec, rows: int, batch_size: int, prompt_tokens: int, new_tokens: int, *, device: str
) -> float:
    """Return the time in which the devices answer rows in validation, each answer as long as it may be.

    It is that of shallow models, as in :func:`timed_seconds`; attention over what is in the cache takes no time here.
    """
    model, _ = _shallow_model(spec, device)
    prompts = min(batch_size, rows)
    length = max(min(prompt_tokens, MAX_TIMED_TOKENS // prompts), 2)
    batch = prompt_batch([[0] * length] * prompts, list(range(prompts)), [], device=torch.device(device))

    def answer(tokens: int) -> None:
        mixed = torch.autocast(device, torch.bfloat16) if spec.mixed else nullcontext()
        with mixed, precision.autocast(model, device):
            generate(model, batch, Generation(max_new_tokens=tokens))

    depth = spec.config.num_hidden_layers
    first = _all_layers(model, partial(answer, 1), depth)
    further = _all_layers(model, partial(answer, 1 + TIMED_NEW_TOKENS), depth) - first
    seconds = first * prompt_tokens / length + max(further, 0) / TIMED_NEW_TOKENS * (new_tokens - 1)
    return seconds * math.ceil(math.ceil(rows / batch_size) / spec.ranks)


def _shallow_model(spec: RunSpec, device: str) -> tuple[Phi3ForCausalLM, Adapter]:
    """A model of the run's shapes, with few layers and without weights of the base."""
    model, adapter = build_meta_model(spec, layers=max(TIMED_LAYERS))
    model.to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for tensor in chain(model.parameters(), model.buffers()):
            tensor.fill_(0.01)  # not zero, nor what memory held: some values are slow
    return model, adapter


def _first_tokens(shape: BatchShape, tokens: int) -> BatchShape:
    """The first tokens of a micro-batch, in one row."""
    if shape.shared is not None:
        return _first_pairs(shape, tokens)
    row: list[int] = []
    for length in chain.from_iterable(shape.lengths):
        row.append(min(length, tokens - sum(row)))
        if sum(row) == tokens:
            break
    return BatchShape([row], max(shape.supervised * sum(row) // shape.tokens, 1))


def _first_pairs(shape: BatchShape, tokens: int) -> BatchShape:
    """The first whole pairs of a micro-batch, in one row, or the first one made shorter."""
    lengths, shared = (list(chain.from_iterable(rows)) for rows in (shape.lengths, shape.shared or []))
    count = 2
    while count < len(lengths) and sum(lengths[: count + 2]) <= tokens:
        count += 2
    lengths, shared = lengths[:count], shared[:count]
    factor = min(tokens / sum(lengths), 1)
    row = [max(int(factor * length), 2) for length in lengths]
    common = [
        min(int(factor * part), own - 1, other - 1) for part, own, other in zip(shared, row, [2, *row], strict=False)
    ]
    return BatchShape([row], max(shape.supervised * sum(row) // shape.tokens, 1), [common])


def _step_seconds(model: Phi3ForCausalLM, step: Callable[[], None], depth: int, mode: CheckpointingMode) -> float:
    """The time of a step of all layers."""
    checkpoint_activations(model, "full" if mode == "offload" else mode)
    return _all_layers(model, step, depth)


def _all_layers(model: Phi3ForCausalLM, step: Callable[[], None], depth: int) -> float:
    """The time of a step of all layers, extrapolated from shallow models."""
    few, more = TIMED_LAYERS
    step()  # warms up
    of_more, of_few = _median_seconds(model, step, more), _median_seconds(model, step, few)
    return of_few + (depth - few) * max(of_more - of_few, 0) / (more - few)


def _median_seconds(model: Phi3ForCausalLM, step: Callable[[], None], layers: int) -> float:
    model.config.num_hidden_layers = layers
    seconds: list[float] = []
    while sum(seconds) < TIMING_SECONDS:
        start = time.perf_counter()
        step()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds)
