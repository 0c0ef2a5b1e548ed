"""Seconds of a micro-batch: by arithmetic, and by a few layers of the model's shapes that are really run."""

import time
from dataclasses import dataclass
from itertools import chain
from statistics import median

import torch
from transformers import Phi3ForCausalLM

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


def least_seconds(model: Phi3ForCausalLM, shape: BatchShape, peak: float) -> float:
    """Return the time of a micro-batch's products with weights alone, at a peak of operations a second."""
    flops = step_flops(model)
    return (flops.per_token * shape.tokens + flops.per_supervised_token * shape.supervised) / peak


def timed_seconds(spec: RunSpec, shape: BatchShape, *, device: str, peak: float | None) -> float:
    """Return the time of a micro-batch on one device, from that of shallow models without weights of the base.

    Args:
        spec: The run, whose layers carry the same adapter each; the copies of ``offload`` take no time here.
        shape: The size of the micro-batch.
        device: Type of the device.
        peak: Operations a second of the device; None: unknown.
    """
    model = build_meta_model(spec, layers=max(TIMED_LAYERS))
    model.to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for tensor in chain(model.parameters(), model.buffers()):
            tensor.fill_(0.01)  # not zero, nor what memory held: some values are slow
    tokens = MAX_TIMED_TOKENS if peak is None else int(TIMED_STEP_SECONDS * peak / step_flops(model).per_token)
    part = _first_tokens(shape, min(max(tokens, MIN_TIMED_TOKENS), MAX_TIMED_TOKENS))
    timer = _Timer(model, spec, part, device)
    if isinstance(spec.mode, int):
        share = recomputed_share(spec.mode, spec.config.num_hidden_layers)
        seconds = (1 - share) * timer.seconds("none") + share * timer.seconds("full")
    else:
        seconds = timer.seconds(spec.mode)
    return seconds * shape.tokens / part.tokens


def _first_tokens(shape: BatchShape, tokens: int) -> BatchShape:
    """The first tokens of a micro-batch, in one row."""
    row: list[int] = []
    for length in chain.from_iterable(shape.lengths):
        row.append(min(length, tokens - sum(row)))
        if sum(row) == tokens:
            break
    return BatchShape([row], max(shape.supervised * sum(row) // shape.tokens, 1))


@dataclass(frozen=True)
class _Timer:
    """Times steps of a shallow model, and extrapolates them to the depth of the run's."""

    model: Phi3ForCausalLM
    spec: RunSpec
    shape: BatchShape
    device: str

    def seconds(self, mode: CheckpointingMode) -> float:
        """Of a step of all layers."""
        few, more = TIMED_LAYERS
        depth = self.spec.config.num_hidden_layers
        checkpoint_activations(self.model, "full" if mode == "offload" else mode)
        self._step()  # warms up
        of_more, of_few = self._median_seconds(more), self._median_seconds(few)
        return of_few + (depth - few) * max(of_more - of_few, 0) / (more - few)

    def _median_seconds(self, layers: int) -> float:
        self.model.config.num_hidden_layers = layers
        seconds: list[float] = []
        while sum(seconds) < TIMING_SECONDS:
            start = time.perf_counter()
            self._step()
            if self.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return median(seconds)

    def _step(self) -> None:
        take_step(self.model, self.spec, self.shape, device=self.device)
