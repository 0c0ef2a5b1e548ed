"""One window of eight rows, split over batches, accumulation, packing and ranks: the same gradient, or not.

The rows have 1 to 500 supervised tokens, the base is random, dropout is 0 and everything float32. Beside each way the
table shows what a mean of means, as the Trainer computes it by itself, gives. The second table is about speed: a step
of one process and of two, one thread each, on eight rows of 90 tokens, so that no rank has longer rows than the other.
Waiting is the time in which a process did not compute: gloo sends, or the other rank is not there yet. Copies are those
between weights and the buffers that are sent, and the rest is computation. The last row has the same model, adapter and
units without this package: torch's ``fully_shard`` and a plain loop.
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
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader
from transformers import AutoConfig, Phi3ForCausalLM

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
TIMED = ("1 process, batch 8", "2 ranks, ddp, batch 4", "2 ranks, FSDP2, batch 4")
PLAIN = "2 ranks, fully_shard alone"
EQUAL_TOKENS, PROMPT_TOKENS = 90, 4
PROFILED = 2
"""Steps under the profiler, which follow those that are timed."""
COPIES = ("fsdp::all_gather_copy_in", "fsdp::chunk_cat", "FSDP::all_gather_copy_out")
"""What the profiler calls the copies between weights, or gradients, and the buffers that are sent."""


class MeanOfMeans(Phi3LoRAModule):
    """What the Trainer makes of a loss that says nothing of its tokens."""

    def weighted_mean(self, loss_sum: torch.Tensor, count: Any, document_ids: list[int]) -> torch.Tensor:
        return loss_sum / torch.as_tensor(count).clamp(min=1)


class Stopwatch:
    """Seconds of a step, those in which its process waited, and those of the copies around what is sent."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.done = 0
        self.start = np.zeros(2)
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.seconds = self.waiting = self.copies = 0.0

    def after_step(self) -> None:
        """Count a step: the first warms up, the next are timed, and the last are profiled."""
        self.done += 1
        now = np.array([time.perf_counter(), time.thread_time()])
        if self.done == 1:
            self.start = now
        if self.done == self.steps:
            self.seconds, computing = (now - self.start) / (self.steps - 1)
            self.waiting = self.seconds - computing
            self.profiler.start()
        if self.done == self.steps + PROFILED:
            self.profiler.stop()
            events = [event for event in self.profiler.key_averages() if event.key.startswith(COPIES)]
            self.copies = sum(event.cpu_time_total for event in events) / 1e6 / PROFILED

    def figures(self) -> tuple[float, float, float]:
        return self.seconds, self.waiting, self.copies


class Watch(pl.Callback):
    """The gradient of the first step, and the times of the later ones."""

    def __init__(self, stopwatch: Stopwatch | None) -> None:
        self.gradient: torch.Tensor | None = None
        self.stopwatch = stopwatch

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.gradient is None:
            grads = (parameter.grad for parameter in pl_module.trained_parameters())
            whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]
            self.gradient = torch.cat([grad.flatten().clone() for grad in whole])

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.stopwatch is not None:
            self.stopwatch.after_step()


def write_base(folder: Path, hidden: int, layers: int) -> str:
    config = {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "vocab_size": 1000, "hidden_size": hidden,
        "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "num_attention_heads": 8,
        "num_key_value_heads": 8, "max_position_embeddings": 1024, "original_max_position_embeddings": 1024,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def documents(supervised: list[int]) -> list[Document]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 1000, count + PROMPT_TOKENS).astype(np.int32) for count in supervised]
    return [Document(i, row, np.array([PROMPT_TOKENS, len(row)], np.int32)) for i, row in enumerate(ids)]


def equal_documents() -> list[Document]:
    return documents([EQUAL_TOKENS - PROMPT_TOKENS] * len(SUPERVISED))


Result = tuple[torch.Tensor, tuple[float, float, float]]
"""The first gradient, and the figures of a later step."""


def train(base: str, way: str, kind: type[Phi3LoRAModule], steps: int) -> Result:
    """Train one step on rows of different lengths, or some on equal ones with their times."""
    strategy, ranks, accumulate, batches = WAYS[way]
    rank = int(os.environ.get("LOCAL_RANK", "0")) if ranks > 1 else 0
    pl.seed_everything(0, verbose=False)
    options: dict[str, Any] = {"lora": {"r": 8, "lora_dropout": 0.0}, "schedule": {"name": "constant", "warmup": 0}}
    module = kind(base, init="random", dtype="float32", gradient_checkpointing="none", **options)
    stopwatch = Stopwatch(steps) if steps > 1 else None
    rows = documents(SUPERVISED) if stopwatch is None else equal_documents()
    own = [collate([[rows[i] for i in row] for row in batch], 0) for batch in batches[rank::ranks]]
    watch = Watch(stopwatch)
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, strategy=FSDP2Strategy() if strategy == "fsdp2" else strategy, max_epochs=1,
        accumulate_grad_batches=accumulate, callbacks=[watch, Start()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(own * (1 if stopwatch is None else steps + PROFILED), batch_size=None))
    assert watch.gradient is not None
    return watch.gradient, (0.0, 0.0, 0.0) if stopwatch is None else stopwatch.figures()


def train_plainly(base: str, steps: int) -> Result:
    """Train the same model on equal rows by ``fully_shard`` and a plain loop."""
    torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    torch.manual_seed(0)
    model = Phi3ForCausalLM._from_config(AutoConfig.from_pretrained(base), attn_implementation="sdpa")
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    get_peft_model(model, LoraConfig(r=8, target_modules=targets))  # in place
    for unit in [*model.model.layers, model.model.embed_tokens]:
        fully_shard(unit)
    fully_shard(model.lm_head, reshard_after_forward=False)
    fully_shard(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    own = equal_documents()[torch.distributed.get_rank() :: 2]
    ids = torch.tensor(np.stack([document.input_ids for document in own]), dtype=torch.int64)
    stopwatch = Stopwatch(steps)
    for _ in range(steps + PROFILED):
        logits = model(input_ids=ids, use_cache=False).logits[:, PROMPT_TOKENS - 1 : -1]
        F.cross_entropy(logits.flatten(0, 1), ids[:, PROMPT_TOKENS:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        stopwatch.after_step()
    torch.distributed.destroy_process_group()
    return torch.zeros(()), stopwatch.figures()


class Start(pl.Callback):
    """Gives every trained weight a value: with LoRA's zeros half of the gradient would be hidden."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        for parameter in pl_module.trained_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.05
            if isinstance(parameter, DTensor):
                values = torch.distributed.tensor.distribute_tensor(values, parameter.device_mesh, parameter.placements)
            parameter.data.copy_(values)


def work(rank: int, ranks: int, port: int, queue: Any, base: str, way: str, kind: Any, steps: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {
        "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    gradient, figures = train_plainly(base, steps) if way == PLAIN else train(base, way, kind, steps)
    queue.put((rank, gradient.numpy(), figures))


def run(
    base: str, way: str, kind: type[Phi3LoRAModule] = Phi3LoRAModule, steps: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first gradient of rank 0, and the figures of a step, means over the ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")  # the imports are done
    queue = context.SimpleQueue()
    ranks = 2 if way == PLAIN else WAYS[way][1]
    processes = [
        context.Process(target=work, args=(rank, ranks, port, queue, base, way, kind, steps)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    results = sorted((queue.get() for _ in processes), key=lambda result: result[0])
    for process in processes:
        process.join()
    return results[0][1], np.mean([figures for _, _, figures in results], axis=0)


def speed_table(base: str, steps: int) -> Table:
    table = Table(title=f"speed, one thread a process, {steps - 1} steps; seconds")
    for column in ("way", "a step", "tokens/s", "times one process", "waiting", "copies", "the rest"):
        table.add_column(column, justify="left" if column == "way" else "right")
    first = 0.0
    for way in (*TIMED, PLAIN):
        seconds, waiting, copies = run(base, way, steps=steps)[1]
        first = first or seconds
        speed = (f"{EQUAL_TOKENS * len(SUPERVISED) / seconds:,.0f}", f"{first / seconds:.2f}")
        times = (f"{value:.3f}" for value in (waiting, copies, seconds - waiting - copies))
        table.add_row(way, f"{seconds:.3f}", *speed, *times)
    return table


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
            console.print(speed_table(base, args.steps))


if __name__ == "__main__":
    main()
