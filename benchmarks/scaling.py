"""The tables of docs/scaling.md, from the formulas there: memory of a GPU and tokens a second on many."""

from dataclasses import dataclass

RANK, TOKENS, ACCUMULATE = 16, 8192, 4
"""LoRA's rank on the four projections; tokens of a micro-batch; micro-batches of a step."""
FLOPS, USED = 989e12, 0.40
"""Peak of an H100 SXM in bf16, and the share of it that LoRA training of an 8B model reached on one in public."""
NVLINK, FABRIC, LATENCY = 450e9, 50e9, 5e-6
"""Bytes a second in each direction within a node of eight and, for each GPU, between nodes; seconds a hop."""


@dataclass(frozen=True)
class Model:
    """The shapes of a model."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int = 32064
    tied: bool = False

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the four projections of a layer."""
        qkv = self.hidden * (self.heads + 2 * self.key_value_heads) // self.heads
        return [(self.hidden, qkv), (self.hidden, self.hidden), (self.hidden, 2 * self.intermediate),
                (self.intermediate, self.hidden)]  # fmt: skip

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        return sum(a * b for a, b in self.shapes) + 2 * self.hidden

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocabulary * self.hidden

    @property
    def base(self) -> int:
        """Parameters of all."""
        return self.layers * self.layer + (1 if self.tied else 2) * self.embedding + self.hidden

    @property
    def gathered(self) -> int:
        """Parameters that FSDP2 gathers in a micro-batch: each layer twice, but the last, embedding and head once."""
        return (2 * self.layers - 1) * self.layer + 2 * self.embedding

    @property
    def adapter(self) -> int:
        """Trained parameters."""
        return self.layers * sum(RANK * (a + b) for a, b in self.shapes)

    def in_layer(self, tokens: int) -> float:
        """Bytes of what a layer makes on its way from one hidden state to the next."""
        return 2 * tokens * (10 * self.hidden + 4 * self.intermediate)

    @property
    def logits(self) -> float:
        """Bytes of a chunk of logits with its gradient."""
        return 2 * 4 * 256 * self.vocabulary

    def activations(self, tokens: int = TOKENS) -> float:
        """Bytes that a micro-batch needs with full checkpointing, and a chunk of logits with its gradient."""
        return 2 * tokens * self.layers * self.hidden + self.in_layer(tokens) + self.logits

    def ddp(self) -> float:
        """Bytes of a GPU: base, adapter with gradient, bucket and two moments, activations."""
        return 2 * self.base + 20 * self.adapter + self.activations()

    def fsdp2(self, gpus: int) -> float:
        """Bytes of a GPU: its share of both, the units that are whole at one time, activations."""
        units = 2 * (self.embedding + 3 * self.layer)
        return (2 * self.base + 16 * self.adapter) / gpus + (units if gpus > 1 else 0) + self.activations()

    def compute(self) -> float:
        """Seconds of a micro-batch: forward, forward again, and the gradients of inputs, none of frozen weights."""
        attention = 4 * self.layers * self.hidden * 2048 / 2
        return TOKENS * 3 * (2 * (self.base - self.embedding) + attention) / (FLOPS * USED)

    def reduce(self, gpus: int) -> float:
        """Seconds of the sum of the adapters' gradients, once a step."""
        return sending(2 * 4 * self.adapter, gpus) + 2 * (gpus - 1) * LATENCY

    def gather(self, gpus: int) -> float:
        """Seconds of gathering the base in each micro-batch."""
        hops = (2 * self.layers + 1) * (gpus - 1) * LATENCY
        return sending(2 * self.gathered, gpus) + hops


def sending(count: float, gpus: int) -> float:
    return count * (gpus - 1) / gpus / (NVLINK if gpus <= 8 else FABRIC)


MODELS = [
    Model("Phi-3-mini", 3072, 8192, 32, 32, 32),
    Model("Phi-3-medium", 5120, 17920, 40, 40, 10),
]


def main() -> None:
    for model in MODELS:
        print(f"{model.name}: {model.base:,} base and {model.adapter:,} trained parameters\n")
        print("| GPUs | ddp: GB a GPU | tokens/s | sent a step | FSDP2: GB a GPU | tokens/s | sent a step |")
        print("|---:|---:|---:|---:|---:|---:|---:|")
        for gpus in (1, 8, 64, 512):
            tokens = gpus * TOKENS * ACCUMULATE
            ddp = tokens / (ACCUMULATE * model.compute() + model.reduce(gpus))
            fsdp = tokens / (ACCUMULATE * max(model.compute(), model.gather(gpus)) + model.reduce(gpus))
            share = (gpus - 1) / gpus
            reduced, gathered = 8 * model.adapter * share, ACCUMULATE * 2 * model.gathered * share
            print(
                f"| {gpus} | {model.ddp() / 1e9:.1f} | {ddp:,.0f} | {reduced / 1e9:.2f} GB "
                f"| {model.fsdp2(gpus) / 1e9:.1f} | {fsdp:,.0f} | {(reduced + gathered) / 1e9:.1f} GB |"
            )
        print()


if __name__ == "__main__":
    main()
