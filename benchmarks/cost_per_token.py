"""What a token costs, whatever the rows: packed longer, ten times as many of them, or of longer documents.

Each case is a process of its own that trains some steps by the Trainer, with gradient checkpointing, over ready-made
tokens of which half are supervised. Seconds are from the end of a step to the end of the next; the first is not timed.
Memory is the most that the process has held. Arithmetic says how much more the frozen products and attention need for a
token of a longer document.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table

from contenders import environments, models
from contenders.task import IGNORE_INDEX
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.batch import Batch
from phi3_lightning.hardware import peak_memory

CASES: dict[str, list[dict[str, int]]] = {
    "length of a packed row, documents of 110 tokens": [
        {"row_tokens": tokens, "document": 110, "rows": 2_000} for tokens in (1_024, 2_048, 16_384)
    ],
    "rows of the data, packed in 1,024 tokens": [
        {"row_tokens": 1_024, "document": 110, "rows": rows} for rows in (1_000, 20_000, 200_000)
    ],
    "documents of one length, packed in 4,096 tokens": [
        {"row_tokens": 4_096, "document": tokens, "rows": 200 if tokens > 500 else 1_000}
        for tokens in (128, 512, 1_024, 2_048, 4_096)
    ],
}


class Steps(pl.Callback):
    """Seconds and tokens of each step."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self._last: float | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.cost.append((now - self._last) / sum(map(sum, batch["document_lengths"])))
        self._last = now


def write(path: Path, count: int, length: int) -> None:
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            ids = rng.choices(range(10, 2_000), k=length)
            labels = [IGNORE_INDEX] * (length // 2) + ids[length // 2 :]
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")


def measure(base: str, case: dict[str, int], steps: int) -> dict[str, float]:
    """Train in this process; return seconds a token and the peak of memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "rows.jsonl", case["rows"], case["document"])
        data = ChatDataModule(
            train=f"{folder}/rows.jsonl", tokenizer=base, format="tokens", val_fraction=0.0,
            max_length=case["row_tokens"], batch_size=1, num_workers=0, cache_dir=folder, seed=0,
        )  # fmt: skip
        module = Phi3LoRAModule(base, gradient_checkpointing="full", lora={"r": 16, "lora_alpha": 32})
        counted = Steps()
        pl.Trainer(
            accelerator="auto", devices=1, precision="bf16-mixed", max_steps=steps, max_epochs=-1, logger=False,
            callbacks=[counted], enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
            default_root_dir=folder,
        ).fit(module, data)  # fmt: skip
        return {"seconds": statistics.median(counted.cost), "bytes": peak_memory(module.device)}


def widened(base: Path, folder: Path) -> Path:
    """Return the base with a window as long as the longest row: no document comes near it, so that no angle changes."""
    config = json.loads((base / "config.json").read_text())
    longest = max(case["row_tokens"] for cases in CASES.values() for case in cases)
    config |= dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), longest)
    for path in base.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def arithmetic(base: str, document: int) -> float:
    """Operations of a token: 6 a frozen weight, recomputation included; attention's two causal products, four times."""
    c = json.loads((Path(base) / "config.json").read_text())
    hidden, layers = c["hidden_size"], c["num_hidden_layers"]
    qkv = hidden + 2 * hidden * c["num_key_value_heads"] // c["num_attention_heads"]
    weights = layers * hidden * (qkv + hidden + 3 * c["intermediate_size"]) + c["vocab_size"] * hidden / 2
    return 6 * weights + 8 * layers * hidden * document


def compare(base: str, fewest: int) -> None:
    """Print a table for each question."""
    for title, cases in CASES.items():
        table = Table("row tokens", "document", "rows", "ms a token", "x", "arithmetic", "peak GB", title=title)
        first = None
        for case in cases:
            steps = max(3, fewest * 1_024 // case["row_tokens"])
            command = [sys.executable, __file__, "--base", base, "--steps", str(steps), "--only", json.dumps(case)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(done.splitlines()[-1])
            operations = arithmetic(base, case["document"])
            first = first or (found["seconds"], operations)
            table.add_row(
                *(f"{case[key]:,}" for key in ("row_tokens", "document", "rows")), f"{found['seconds'] * 1e3:.2f}",
                f"{found['seconds'] / first[0]:.2f}", f"{operations / first[1]:.2f}", f"{found['bytes'] / 1e9:.2f}",
            )  # fmt: skip
        Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="folder of a model; else a real one of 134 million parameters is converted")
    parser.add_argument("--steps", type=int, default=6, help="steps of a case; the first is not timed")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.base, json.loads(given.only), given.steps)))
        return
    base = Path(given.base) if given.base else models.convert_real(environments.CACHE / "models" / "real")
    with tempfile.TemporaryDirectory() as folder:
        compare(str(widened(base, Path(folder))), given.steps)


if __name__ == "__main__":
    main()
