"""A training step of LoRA on the four linear layers of a Phi-3-mini block, in bfloat16, by each backend.

Beside them: a bare chain of ``F.linear`` that does the same work, for an update of the whole matrix (PEFT's) and for
one of each slice (loralib's); the frozen layers alone; and plain ``loralib.MergedLinear``. All have float32 adapter
weights under autocast, the same input, and a gradient for the input, as inside a model. Time is the median over
alternating rounds; memory is what the step adds at its peak, each in a process of its own.
"""

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import loralib
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from phi3_lightning.adapters import loralib_layers, peft_patches
from phi3_lightning.adapters.targets import Target

SLICES = {
    "qkv_proj": (3072, {"q_proj": 3072, "k_proj": 3072, "v_proj": 3072}),
    "o_proj": (3072, {"o_proj": 3072}),
    "gate_up_proj": (3072, {"gate_proj": 8192, "up_proj": 8192}),
    "down_proj": (8192, {"down_proj": 3072}),
}
"""Inputs and the rows of each slice of Phi-3-mini's layers."""

RANK, SCALING = 16, 2.0

Layers = dict[str, Callable[[Tensor], Tensor]]


class Block(nn.Module):
    """The frozen layers of a block."""

    def __init__(self) -> None:
        super().__init__()
        for name, (inputs, slices) in SLICES.items():
            setattr(self, name, nn.Linear(inputs, sum(slices.values()), bias=False))
        self.bfloat16().requires_grad_(False)


def frozen(dropout: float) -> Layers:  # noqa: ARG001, which has none
    return dict(Block().named_children())


def weights(inputs: int, rows: int, slices: int = 1) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.randn(slices * RANK, inputs) * 0.02), nn.Parameter(torch.randn(rows, RANK) * 0.02)


def bare_whole(dropout: float) -> Layers:
    def layer(base: nn.Linear, inputs: int, rows: int) -> Callable[[Tensor], Tensor]:
        down, up = weights(inputs, rows)
        return lambda x: F.linear(x, base.weight) + F.linear(F.linear(F.dropout(x, dropout), down), up) * SCALING

    block = Block()
    return {name: layer(getattr(block, name), inputs, sum(s.values())) for name, (inputs, s) in SLICES.items()}


def bare_slices(dropout: float) -> Layers:
    def layer(base: nn.Linear, inputs: int, sizes: list[int]) -> Callable[[Tensor], Tensor]:
        down, up = weights(inputs, sum(sizes), len(sizes))

        def forward(x: Tensor) -> Tensor:
            low = F.linear(F.dropout(x, dropout), down).split(RANK, dim=-1)
            return F.linear(x, base.weight) + torch.cat(list(map(F.linear, low, up.split(sizes))), -1) * SCALING

        return forward

    block = Block()
    return {name: layer(getattr(block, name), inputs, list(s.values())) for name, (inputs, s) in SLICES.items()}


def by_peft(dropout: float) -> Layers:
    block = Block()
    config = LoraConfig(r=RANK, lora_alpha=RANK * SCALING, lora_dropout=dropout, target_modules=list(SLICES))
    adapted = get_peft_model(block, config).base_model.model
    for name in SLICES:
        peft_patches.patch_layer(getattr(adapted, name), "default")
    return {name: getattr(adapted, name) for name in SLICES}


def by_loralib(dropout: float) -> Layers:
    block = Block()
    for name, (_, slices) in SLICES.items():
        target = Target(name, slices, (True,) * len(slices), RANK, SCALING)
        loralib_layers.adapt(getattr(block, name), target, dropout)
    return dict(block.named_children())


def plain_loralib(dropout: float) -> Layers:
    def layer(base: nn.Linear, slices: dict[str, int]) -> nn.Module:
        options = {
            "r": RANK,
            "lora_alpha": RANK * SCALING,
            "lora_dropout": dropout,
            "merge_weights": False,
            "bias": False,
        }
        if len(slices) > 1:
            options["enable_lora"] = [True] * len(slices)
        kind = loralib.MergedLinear if len(slices) > 1 else loralib.Linear
        new = kind(base.in_features, base.out_features, **options)
        new.weight = base.weight
        return new

    block = Block()
    return {name: layer(getattr(block, name), slices) for name, (_, slices) in SLICES.items()}


PEERS = {
    "frozen layers alone": frozen,
    "bare F.linear chain, whole matrices": bare_whole,
    "backend peft": by_peft,
    "bare F.linear chain, slices": bare_slices,
    "backend loralib": by_loralib,
    "plain loralib (MergedLinear)": plain_loralib,
}
BARE = {"backend peft": "bare F.linear chain, whole matrices", "backend loralib": "bare F.linear chain, slices"}


def step(layers: Layers, tokens: int, device: str) -> Iterator[None]:
    """Forward and backward of each layer, as often as asked."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = [
        torch.randn(1, tokens, n, generator=generator, device=device).bfloat16().requires_grad_()
        for n, _ in SLICES.values()
    ]
    while True:
        for x, layer in zip(inputs, layers.values(), strict=True):
            x.grad = None
            with torch.autocast(device, dtype=torch.bfloat16):
                y = layer(x)
            y.backward(torch.ones_like(y))
        yield


def made(name: str, given: argparse.Namespace) -> Iterator[None]:
    torch.manual_seed(0)
    with torch.device(given.device):
        return step(PEERS[name](given.dropout), given.tokens, given.device)


def peak_megabytes(name: str, given: argparse.Namespace) -> float:
    """What a step adds to the memory of a process that has done one, at its peak."""
    if given.device == "cuda":
        steps = made(name, given)
        next(steps)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        next(steps)
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        steps = made(name, given)
        next(steps)
        ctypes.CDLL(None).malloc_trim(0)  # what the first step has freed
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of making the layers
        held = resident("VmRSS")
        next(steps)
        os.write(writing, str(resident("VmHWM") - held).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    return float(os.read(reading, 64))


def resident(key: str) -> float:
    """Megabytes of this process that are in memory (VmRSS), or were at the peak (VmHWM); Linux alone tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in a step")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each, in turn")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    memory = {name: peak_megabytes(name, given) for name in PEERS}  # first: a fork inherits no pool of threads
    steps = {name: made(name, given) for name in PEERS}
    seconds: dict[str, list[float]] = {name: [] for name in PEERS}
    for turn in range(given.rounds + 2):
        for name, running in steps.items():
            start = time.perf_counter()
            next(running)
            if given.device == "cuda":
                torch.cuda.synchronize()
            if turn > 1:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    table = Table(
        "", "ms a step", "of its bare chain", "peak MB of a step", title=f"{given.tokens} tokens, {given.device}"
    )
    for name in PEERS:
        bare = BARE.get(name)
        ratio = (
            f"{statistics.median(a / b for a, b in zip(seconds[name], seconds[bare], strict=True)):.2f}" if bare else ""
        )
        table.add_row(name, f"{1000 * medians[name]:.0f}", ratio, f"{memory[name]:.0f}")
    Console().print(table)
    if given.device == "cpu":
        print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
