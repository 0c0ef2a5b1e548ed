"""Matrix products of Phi-3-mini's shapes in bfloat16, and in 8 bits: int8 on a CPU, float8 on a GPU since Ada.

For each frozen matrix three times, measured in turns: the product in bfloat16; the same in 8 bits; and that with its
input quantised by token first, which training would have to do. Both directions: ``x @ W.T``, and ``grad @ W`` for the
gradient of the input. In float8 (e4m3) the second one reads a transposed copy of W: Hopper's products want one layout.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

SHAPES = {"qkv_proj": (9216, 3072), "o_proj": (3072, 3072), "gate_up_proj": (16384, 3072), "down_proj": (3072, 8192)}
"""Rows and columns of the weights."""
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantized(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return rows in 8 bits and the scale of each, float32, shape (rows, 1)."""
    scale = rows.abs().amax(-1, keepdim=True).float().clamp_(min=1e-12) / LARGEST[dtype]
    values = rows.float() / scale
    return (values.round_() if dtype == torch.int8 else values).to(dtype), scale


def product_in_8_bits(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """Return ``x @ w.T`` in bfloat16 from quantised matrices with a scale for each of their rows."""
    if x.dtype == torch.int8:
        return (torch._int_mm(x, w.T).float() * x_scale * w_scale.T).bfloat16()
    return torch._scaled_mm(x, w.T, scale_a=x_scale, scale_b=w_scale.T.contiguous(), out_dtype=torch.bfloat16)


def seconds(work: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each, run in turns after one turn that warms up."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, function in work.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn > 0:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="tokens")
    parser.add_argument("--shrink", type=int, default=1, help="divides the sides of the matrices")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float8_e4m3fn if device.type == "cuda" else torch.int8
    table = Table("matrix", "direction", "bf16 TFLOP/s", "8 bits", "x", "with its quantisation", "x")
    table.title = f"{args.rows:,} tokens, {str(dtype).removeprefix('torch.')}, {device}"
    for name, shape in SHAPES.items():
        weight = torch.randn([side // args.shrink for side in shape], device=device).bfloat16()
        turned = weight.T.contiguous() if device.type == "cuda" else weight.T
        for direction, right in (("x @ W.T", weight), ("grad @ W", turned)):
            left = torch.randn(args.rows, right.shape[1], device=device).bfloat16()
            eight, eights = quantized(left, dtype), quantized(right, dtype)
            work: dict[str, Callable[[], object]] = {
                "bf16": lambda left=left, right=right: left @ right.T,
                "8": lambda eight=eight, eights=eights: product_in_8_bits(*eight, *eights),
                "all": lambda left=left, eights=eights: product_in_8_bits(*quantized(left, dtype), *eights),
            }
            taken = seconds(work, args.repeats, device)
            flops = 2 * args.rows * right.numel() / 1e12
            rates = [f"{flops / taken['bf16']:.2f}"]
            for kind in ("8", "all"):
                rates += [f"{flops / taken[kind]:.2f}", f"{taken['bf16'] / taken[kind]:.2f}"]
            table.add_row(name, direction, *rates)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
