"""One window of eight rows, split over batches, accumulation, packing and ranks: the same gradient, or not.

The rows have 1 to 500 supervised tokens, the base is random, dropout is 0 and everything float32. Beside each way the
table shows what a mean of means, as the Trainer computes it by itself, gives. The second table is about speed: a step
of one process and of two, one thread each.
"""

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from phi3_lightning import FSDP2Strategy, Phi3LoRAModule
from phi3_lightning.data.collate import Document, collate

SUPERVISED = [1, 500, 3, 40, 25, 2, 110, 7]
TOLERANCE = sum(SUPERVISED) * torch.finfo(torch.float32).eps
"""A rounding for each token's gradient, in another order of summation."""
WAYS: dict[str, tuple[Any, int, int, list[list[list[int]]]]] = {
    "1 process, batch 8": ("auto", 1, 1, [[[i] for i in range(8)]]),
    "1 process, accumulation 8": ("auto", 1, 8, [[[i]] for i in range(8)]),
    "1 process, packed in 2 rows": ("auto", 1, 1, [[[1], [0, 2, 3, 4, 5, 6, 7]]]),
    "2 ranks, ddp, batch 4": ("ddp", 2, 1, [[[i] for i in range(0, 8, 2)], [[i] for i in range(1, 8, 2)]]),
    "2 ranks, ddp, packed, one rank empty": ("ddp", 2, 1, [[[1], [0, 2, 3, 4, 5, 6, 7]], []]),
    "2 ranks, FSDP2, batch 4": ("fsdp2", 2, 1, [[[i] for i in range(0, 8, 2)], [[i] for i in range(1, 8, 2)]]),
    "2 ranks, FSDP2, accumulation 4": ("fsdp2", 2, 4, [[[i]] for i in range(8)]),
}
"""Strategy, ranks, micro-batches of a window on each rank, and the documents of each row of each batch."""


class MeanOfMeans(Phi3LoRAModule):
    """What the Trainer makes of a loss that says nothing of its tokens."""

    def weighted_mean(self, loss_sum: torch.Tensor, count: Any, document_ids: list[int]) -> torch.Tensor:
        return loss_sum / torch.as_tensor(count).clamp(min=1)


class Watch(pl.Callback):
    """The gradient of the first step, and the seconds of the later ones."""

    def __init__(self) -> None:
        self.gradient: torch.Tensor | None = None
        self.started = 0.0

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.gradient is None:
            grads = (parameter.grad for parameter in pl_module.trained_parameters())
            whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]
            self.gradient = torch.cat([grad.flatten().clone() for grad in whole])

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 1 and not self.started:
            self.started = time.perf_counter()


def write_base(folder: Path, hidden: int, layers: int) -> str:
    config = {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "vocab_size": 1000, "hidden_size": hidden,
        "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "num_attention_heads": 8,
        "num_key_value_heads": 8, "max_position_embeddings": 1024, "original_max_position_embeddings": 1024,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def documents() -> list[Document]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 1000, count + 4).astype(np.int32) for count in SUPERVISED]
    return [Document(i, row, np.array([4, len(row)], np.int32)) for i, row in enumerate(ids)]


def train(base: str, way: str, kind: type[Phi3LoRAModule], steps: int) -> tuple[torch.Tensor, float]:
    """Return the first gradient and the seconds of a later step."""
    strategy, ranks, accumulate, batches = WAYS[way]
    rank = int(os.environ.get("LOCAL_RANK", "0")) if ranks > 1 else 0
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    options: dict[str, Any] = {"lora": {"r": 8, "lora_dropout": 0.0}, "schedule": {"name": "constant", "warmup": 0}}
    module = kind(base, init="random", dtype="float32", gradient_checkpointing="none", **options)
    rows = documents()
    own = [collate([[rows[i] for i in row] for row in batch], 0) for batch in batches[rank::ranks]] * steps
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, strategy=FSDP2Strategy() if strategy == "fsdp2" else strategy, max_epochs=1,
        accumulate_grad_batches=accumulate, callbacks=[watch, Start()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(own, batch_size=None))
    assert watch.gradient is not None
    seconds = (time.perf_counter() - watch.started) / (steps - 1) if steps > 1 else 0.0
    return watch.gradient, seconds


class Start(pl.Callback):
    """Gives every trained weight a value: with LoRA's zeros half of the gradient would be hidden."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        for parameter in pl_module.trained_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.05
            if isinstance(parameter, DTensor):
                values = torch.distributed.tensor.distribute_tensor(values, parameter.device_mesh, parameter.placements)
            parameter.data.copy_(values)


def work(rank: int, port: int, queue: Any, *task: Any) -> None:
    warnings.simplefilter("ignore")
    os.environ |= {
        "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(WAYS[task[1]][1]),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    gradient, seconds = train(*task)
    if rank == 0:
        queue.put((gradient.numpy(), seconds))


def run(base: str, way: str, kind: type[Phi3LoRAModule] = Phi3LoRAModule, steps: int = 1) -> tuple[np.ndarray, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")  # the imports are done
    queue = context.SimpleQueue()
    task = (port, queue, base, way, kind, steps)
    processes = [context.Process(target=work, args=(rank, *task)) for rank in range(WAYS[way][1])]
    for process in processes:
        process.start()
    result = queue.get()
    for process in processes:
        process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed; 1: none")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the random base")
    parser.add_argument("--layers", type=int, default=4, help="layers of the random base")
    args = parser.parse_args()
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder), args.hidden, args.layers)
        reference = run(base, next(iter(WAYS)))[0]
        table = Table(title=f"gradient of one window, relative to its largest entry; tolerance {TOLERANCE:.1e}")
        for column in ("way", "difference", "", "mean of means"):
            table.add_column(column, justify="left" if column == "way" else "right")
        for way in WAYS:
            differences = [
                np.abs(run(base, way, kind)[0] - reference).max() / np.abs(reference).max()
                for kind in (Phi3LoRAModule, MeanOfMeans)
            ]
            verdict = "same" if differences[0] <= TOLERANCE else "DIFFERENT"
            table.add_row(way, f"{differences[0]:.1e}", verdict, f"{differences[1]:.1e}")
        console.print(table)
        if args.steps > 1:
            tokens = sum(SUPERVISED) + 4 * len(SUPERVISED)
            speed = Table(title=f"speed, one thread a process, {args.steps - 1} steps")
            for column in ("way", "seconds a step", "tokens/s", "times one process"):
                speed.add_column(column, justify="left" if column == "way" else "right")
            first = 0.0
            for way in ("1 process, batch 8", "2 ranks, ddp, batch 4", "2 ranks, FSDP2, batch 4"):
                seconds = run(base, way, steps=args.steps)[1]
                first = first or seconds
                speed.add_row(way, f"{seconds:.2f}", f"{tokens / seconds:,.0f}", f"{first / seconds:.2f}")
            console.print(speed)


if __name__ == "__main__":
    main()
