"""A time budget of one training step: what the frozen matrix products take alone, and where the rest goes.

Three times stand side by side, measured in turns in one process: the whole step (forward, backward, optimiser) on one
packed row of generated chats; its frozen products alone, same weights, types and numbers of rows, forward and for the
gradients of their inputs, the head on supervised positions; and what arithmetic says of those at the fastest matrix
product of the device. Then torch's profiler shows the step operator by operator. The Trainer's own work is not in it.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from contenders import ceiling, chats, environments, models
from phi3_lightning import ChatDataModule, Phi3LoRAModule, optim
from phi3_lightning.batch import IGNORE_INDEX, Batch
from phi3_lightning.model.compile import choose_compilation

NAMES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def packed_row(base: str, tokens: int, folder: Path) -> Batch:
    """Return the first batch of generated chats: one row of at most so many tokens."""
    chats.write_chats(folder / "chats.jsonl", 400, chats.tokenizer_of(base))
    data = ChatDataModule(
        train=str(folder / "chats.jsonl"), tokenizer=base, val_fraction=0.0, max_length=tokens,
        batch_size=1, num_workers=0, cache_dir=str(folder), seed=0,
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def frozen_products(module: Phi3LoRAModule, tokens: int, supervised: int) -> Callable[[], None]:
    """Return a function that multiplies with each frozen matrix twice, as the forward and the backward pass do."""
    model = module.loaded_model
    weights = [(layer.weight, tokens) for name, layer in model.named_modules()
               if isinstance(layer, nn.Linear) and name.removesuffix(".base_layer").endswith(NAMES)]  # fmt: skip
    weights.append((model.lm_head.weight, supervised))
    sides = {(rows, size) for weight, rows in weights for size in weight.shape}
    random = {side: torch.randn(side, device=module.device).to(model.dtype) for side in sides}

    def multiply() -> None:
        for weight, rows in weights:
            out, into = weight.shape
            random[rows, into] @ weight.T
            random[rows, out] @ weight

    return multiply


def step_of(module: Phi3LoRAModule, batch: Batch) -> Callable[[], None]:
    """Return a function that trains once on a batch."""
    role = module.adapter.role
    trained = [(role(name), parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    optimizer = optim.make_optimizer(trained, module.optimizer_config, fused=True)

    def step() -> None:
        with module.autocast():
            loss, count = module.compute_loss(module(batch), module.head, batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Return how long something takes once."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def operators(step: Callable[[], None], device: torch.device, limit: int) -> Table:
    """Return the operators that take most of a step, by the time that is their own."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as seen:
        seconds(step, device)
    kind = "device" if device.type == "cuda" else "cpu"
    rows: list[Any] = sorted(seen.key_averages(), key=lambda row: -getattr(row, f"self_{kind}_time_total"))
    total = sum(getattr(row, f"self_{kind}_time_total") for row in rows)
    table = Table("operator", "calls", "ms", "share", title=f"Operators of one step, by their own {kind} time")
    for row in rows[:limit]:
        own = getattr(row, f"self_{kind}_time_total")
        table.add_row(row.key, f"{row.count:,}", f"{own / 1e3:,.1f}", f"{own / total:.1%}")
    return table


def loaded(base: str, args: argparse.Namespace, quantization: Any, device: torch.device) -> Phi3LoRAModule:
    """Return a module with its base in memory."""
    module = Phi3LoRAModule(
        base, gradient_checkpointing=args.gradient_checkpointing, quantization=quantization,
        lora={"r": 16, "lora_alpha": 32, "use_dora": args.dora},
    ).to(device)  # fmt: skip
    module.configure_model()
    return module


def budget(title: str, base: str, args: argparse.Namespace) -> None:
    """Print where the time of a step of one model goes."""
    console = Console()
    console.print(f"\n{title}", style="bold")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        module = loaded(base, args, args.quantization, device)
        batch = packed_row(base, args.row_tokens, Path(name))
    tokens = sum(length for row in batch["document_lengths"] for length in row)
    supervised = int((batch["labels"] != IGNORE_INDEX).sum())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of the model before
    module.to(device).train()
    with module.autocast():
        choose_compilation(module.loaded_model, args.compile, args.repeats, dora=args.dora)
    on_device: Any = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    work = {"the step": step_of(module, on_device)}
    plain = module
    if args.quantization == "int8_dynamic":
        plain = loaded(base, args, None, device).train()
        work["the step in bfloat16"] = step_of(plain, on_device)
    work["its frozen products alone"] = frozen_products(plain, tokens, supervised)
    taken: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(args.repeats + 1):
        for name, function in work.items():
            if (found := seconds(function, device)) and turn > 0:  # the first one warms up
                taken[name].append(found)
    needed, peak = ceiling.needed_flops(base, tokens, supervised), ceiling.matmul_flops(device.type)
    table = Table("", "ms", "x", title=f"{tokens:,} tokens in one row, {supervised:,} of them supervised, {device}")
    step = statistics.median(taken["the step"])
    for name, values in taken.items():
        middle = statistics.median(values)
        table.add_row(name, f"{middle * 1e3:,.1f}", f"{middle / step:.2f}")
    arithmetic = needed / peak
    table.add_row(
        f"arithmetic: {needed / 1e12:.2f} TFLOP at {peak / 1e12:.2f} TFLOP/s", f"{arithmetic * 1e3:,.1f}",
        f"{arithmetic / step:.2f}",
    )  # fmt: skip
    console.print(table)
    console.print(f"the step takes {step / statistics.median(taken['its frozen products alone']):.2f} times its frozen "
                  f"products; {tokens / step:,.0f} tokens/s")  # fmt: skip
    if "the step in bfloat16" in taken:
        ratio = statistics.median(b / a for a, b in zip(taken["the step"], taken["the step in bfloat16"], strict=True))
        console.print(f"in 8 bits the step is {ratio:.2f} times as fast as in bfloat16, the median of the turns")
    if device.type == "cuda":
        console.print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    console.print(operators(work["the step"], device, args.operators))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="folder of a model; else Phi-3-mini's shapes, random, and a small real model")
    parser.add_argument("--layers", type=int, default=3, help="of the random one")
    parser.add_argument("--row_tokens", type=int, default=1024)
    parser.add_argument("--gradient_checkpointing", default="none", choices=("none", "selective", "full", "offload"))
    parser.add_argument("--compile", default="none", choices=("none", "layers"))
    parser.add_argument("--dora", action="store_true")
    parser.add_argument(
        "--quantization", choices=("nf4", "int8", "int8_dynamic"), help="int8_dynamic: beside the step in bfloat16"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--operators", type=int, default=20, help="how many are shown")
    args = parser.parse_args()
    if args.base:
        budget(args.base, args.base, args)
        return
    with tempfile.TemporaryDirectory() as name:
        title = f"Phi-3-mini's shapes, {args.layers} of 32 layers"
        budget(title, str(models.write_random(Path(name) / "base", args.layers)), args)
    real = models.convert_real(environments.CACHE / "models" / "real")
    budget("a real model of 134 million parameters", str(real), args)


if __name__ == "__main__":
    main()
