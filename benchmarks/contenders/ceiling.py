"""What the machine and the arithmetic allow."""

import json
import statistics
import sys
import time
from pathlib import Path

import torch


def matmul_flops(device: str, sizes: tuple[int, ...] = (1024, 2048, 4096), rounds: int = 7) -> float:
    """Return the floating-point operations a second of the fastest of several bfloat16 matrix products."""
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            a @ b
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        best = max(best, 2 * size**3 / statistics.median(seconds))
    return best


def needed_flops(base: str, real: float, supervised: float) -> float:
    """Return the operations that training an adapter on so many tokens needs at least.

    The frozen weights' products, forward and for the gradients of their inputs (2 + 2 for each weight); the head on
    supervised tokens alone. Attention, the adapter, padding and recomputation are not counted.

    Args:
        base: Folder of the base model.
        real: Tokens, without padding.
        supervised: Those with a label.
    """
    c = json.loads((Path(base) / "config.json").read_text())
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    qkv = hidden * (heads + 2 * c["num_key_value_heads"]) // heads
    layer = hidden * (qkv + hidden + 3 * c["intermediate_size"])
    return 4 * (c["num_hidden_layers"] * layer * real + c["vocab_size"] * hidden * supervised)


if __name__ == "__main__":
    print(json.dumps(matmul_flops(sys.argv[1])))
