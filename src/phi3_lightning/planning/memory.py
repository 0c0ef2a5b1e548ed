"""The most memory that a run needs on one device, by part."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torch import Tensor, nn

from phi3_lightning.model.activation_checkpointing import CheckpointingMode
from phi3_lightning.model.loss import CHUNK, GPU_CHUNK
from phi3_lightning.optim import state_bytes
from phi3_lightning.planning.dry_run import Activations, FakeModule
from phi3_lightning.planning.spec import RunSpec
from phi3_lightning.planning.step import BatchShape

NF4_BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""In 4 bits with double quantisation: an 8-bit scale for 64 weights, a float32 for 256 of those."""
INT8_BYTES_PER_WEIGHT = 1.0
"""In 8 bits; each row has a float32 scale besides."""
CUDA_CONTEXT_BYTES = 1.0e9
"""CUDA's context, its libraries' workspaces and what the allocator cannot use on a GPU. Not measured."""

CPU_PROCESS_BYTES = 1.0e9
"""Python and its libraries on a CPU before there is a model, at the most."""
FIRST_STEP_LIBRARY_BYTES = 0.1e9
"""What libraries load in a CPU's first step."""
FRAGMENTATION_PER_PEAK_BYTE = 0.2
"""What a CPU's heap leaves between tensors, as a share of what is alive at the peak. Calibrated (docs/plan.md)."""
FRAGMENTATION_PER_ACTIVATION_BYTE = 0.15
"""As much again, as a share of what would be alive if nothing were recomputed: whatever is made once leaves a hole."""
MAX_ACTIVATION_FRAGMENTATION_BYTES = 0.6e9
"""The second share at the most."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of training."""

    base: float
    """The frozen weights."""
    adapter: float
    """The trained weights, their gradients, what the strategy needs to sum these, and a reference's frozen copy."""
    optimizer: float
    """Its moments."""
    stored: float
    """What the forward pass keeps for the backward pass."""
    head: float
    """Logits and their gradients."""
    layer: float
    """A layer's pass: forward before the head runs, or backward after it."""
    reference: float
    """A forward pass without a gradient, as by a reference; 0 where the objective takes none."""
    process: float
    """Python and its libraries on a CPU; the driver on a GPU."""
    fragmentation: float
    """What the allocator of a CPU cannot use, and what libraries load in the first step."""

    @property
    def working(self) -> float:
        """The largest of head, layer and reference."""
        return max(self.head, self.layer, self.reference)

    @property
    def total(self) -> float:
        """All at the peak."""
        weights = self.base + self.adapter + self.optimizer
        return weights + self.stored + self.working + self.process + self.fragmentation


class MemoryPredictor:
    """Predicts the peak of a run; the model without values is built once, when it is first needed."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec

    @cached_property
    def fake(self) -> FakeModule:
        """The model without values; a ModelError where the base cannot carry the adapter."""
        return FakeModule(self.spec)

    def with_mode(self, mode: CheckpointingMode | int) -> "MemoryPredictor":
        """Return the predictor of the same run with another checkpointing mode; both share the model without values."""
        other = MemoryPredictor(replace(self.spec, gradient_checkpointing=mode))
        other.fake = self.fake
        return other

    def memory(self, shape: BatchShape, mode: CheckpointingMode | int | None = None) -> Memory:
        """Predict the peak of the run for the size of its largest micro-batch; mode None: as the run is configured."""
        return self._with_activations(shape, self.fake.activations(shape, mode or self.spec.mode))

    def validation_memory(self, shape: BatchShape) -> Memory:
        """Predict the peak of a validation during the run, for the size of its largest micro-batch."""
        return self._with_activations(shape, self.fake.validation_activations(shape))

    def _with_activations(self, shape: BatchShape, activations: Activations) -> Memory:
        spec, model = self.spec, self.fake.model
        frozen = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.requires_grad]
        trained = sum(parameter.numel() for parameter in self.fake.trained)
        buckets = 4 if spec.ranks > 1 and not spec.sharded else 0  # of DistributedDataParallel
        copy = 4 if spec.copies_adapter else 0
        memory = Memory(
            base=sum(map(_bytes, frozen)),
            adapter=(8 + buckets + copy) * trained,
            optimizer=state_bytes(spec.optimizer) * trained,
            stored=activations.stored,
            head=activations.head * (_chunks_of_a_gpu(shape.supervised) if spec.on_gpu else 1),
            layer=activations.layer,
            reference=activations.reference,
            process=CUDA_CONTEXT_BYTES if spec.process is None else spec.process,
            fragmentation=0 if spec.on_gpu else self._fragmentation(shape, activations.peak),
        )
        if spec.quantization is not None and spec.quantization != "int8_dynamic":  # the model has these weights itself
            memory = quantized(memory, model, spec.quantization)
        return sharded(memory, model, spec.ranks) if spec.sharded else memory

    def _fragmentation(self, shape: BatchShape, peak: float) -> float:
        everything = self.fake.activations(shape, "none").peak
        share = min(FRAGMENTATION_PER_ACTIVATION_BYTE * everything, MAX_ACTIVATION_FRAGMENTATION_BYTES)
        return FIRST_STEP_LIBRARY_BYTES + FRAGMENTATION_PER_PEAK_BYTE * peak + share


def _chunks_of_a_gpu(supervised: int) -> float:
    """How many times more positions a GPU's head takes at once than the dry run's, which is a CPU's."""
    return min(GPU_CHUNK, supervised) / min(CHUNK, supervised) if supervised else 1.0


def quantized(memory: Memory, model: nn.Module, kind: Literal["nf4", "int8"]) -> Memory:
    """Return the memory with the layers' linear weights, not the head, in 4 or 8 bits; a calculation."""
    layers = [part for part in model.get_submodule("model").modules() if isinstance(part, nn.Linear)]
    weights = [layer.weight for layer in layers if not layer.weight.requires_grad]
    full = sum(map(_bytes, weights))
    if kind == "nf4":
        small = sum(weight.numel() * NF4_BYTES_PER_WEIGHT for weight in weights)
    else:
        small = sum(weight.numel() * INT8_BYTES_PER_WEIGHT + 4 * len(weight) for weight in weights)
    largest = max(map(_bytes, weights))  # is unpacked where it is multiplied
    reference = memory.reference + largest if memory.reference else 0
    return replace(memory, base=memory.base - full + small, layer=memory.layer + largest, reference=reference)


def sharded(memory: Memory, model: nn.Module, ranks: int) -> Memory:
    """Return the memory of one of the ranks of FSDP2; a calculation (docs/scaling.md)."""
    head, layer = (
        sum(_bytes(tensor) for tensor in model.get_submodule(name).parameters() if not tensor.requires_grad)
        for name in ("lm_head", "model.layers.0")
    )
    # whole at one time: the head, a layer, and the next one's buffer and copy
    units = (head + 3 * layer) if ranks > 1 else 0
    shares = {name: getattr(memory, name) / ranks for name in ("adapter", "optimizer")}
    gathered = {name: size + units for name in ("head", "layer", "reference") if (size := getattr(memory, name)) > 0}
    return replace(memory, base=memory.base / ranks, **shares, **gathered)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
