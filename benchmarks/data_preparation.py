"""Tokenising chats: this package beside TRL, on the same generated file, each in a process of its own.

Both read the same JSON lines, render them with the same tokenizer's chat template and leave Arrow files behind. TRL
keeps every token as a target (its default); this package also finds the assistants' tokens and checks every row.
Seconds are without imports.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console
from rich.table import Table

import phi3_lightning

TINY = Path(phi3_lightning.__file__).parent / "assets" / "tiny_phi3"


SYLLABLES = ("ta", "ren", "mo", "li", "sun", "der", "ka", "pri", "ven", "to", "ing", "er", "ly", "ment", "as", "tion")


def write_chats(path: Path, rows: int) -> None:
    """Write conversations of one to four exchanges, as long as real chats, of words as rare as in real texts."""
    rng = random.Random(0)
    words = ["".join(rng.choices(SYLLABLES, k=1 + (rank >= 16) + (rank >= 4096))) for rank in range(50_000)]
    shares = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))  # Zipf's law
    with path.open("w") as file:
        for _ in range(rows):
            messages = []
            for _ in range(rng.randint(1, 4)):
                for role, most in (("user", 30), ("assistant", 60)):
                    chosen = rng.choices(words, cum_weights=shares, k=rng.randint(3, most))
                    messages.append({"role": role, "content": " ".join(chosen).capitalize() + "."})
            file.write(json.dumps({"messages": messages}) + "\n")


def prepare_here(path: str, tokenizer: str, processes: int, cache: str) -> tuple[int, float]:
    """Prepare with this package; tokens, and when work began."""
    import datasets  # noqa: F401, which is only loaded where it is needed

    from phi3_lightning.data.datamodule import ChatDataModule

    start = time.perf_counter()
    datamodule = ChatDataModule(train=path, tokenizer=tokenizer, max_length=1024, num_proc=processes, cache_dir=cache)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule.statistics["train"].tokens, start


def prepare_trl(path: str, tokenizer: str, processes: int, cache: str) -> tuple[int, float]:
    """Prepare with what ``SFTTrainer`` does to its data set; tokens, and when work began."""
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # their names load what they need

    start = time.perf_counter()
    chats = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    config = SFTConfig(output_dir=cache, dataset_num_proc=processes, max_length=1024, bf16=False, use_cpu=True)
    trainer = SimpleNamespace(_tokenizer=loaded, chat_template=None, completion_only_loss=False)
    prepared = SFTTrainer._prepare_dataset(trainer, chats, loaded, config, False, None, "train")
    lengths = prepared.data.column("input_ids").combine_chunks().value_lengths()
    return int(lengths.sum().as_py()), start


PEERS = {"phi3_lightning": prepare_here, "trl": prepare_trl}


def measure(peer: str, path: str, tokenizer: str, processes: int) -> dict[str, float]:
    """Run one peer in this process."""
    with tempfile.TemporaryDirectory() as cache:
        tokens, start = PEERS[peer](path, tokenizer, processes, cache)
        seconds = time.perf_counter() - start
    memory = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"tokens": tokens, "seconds": seconds, "main": memory[0], "worker": memory[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000], help="conversations; several sizes")
    parser.add_argument("--processes", type=int, default=2, help="processes that tokenise")
    parser.add_argument("--tokenizer", default=str(TINY), help="folder or hub id")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS, help="what to measure")
    parser.add_argument("--only", nargs=2, metavar=("PEER", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(*given.only, given.tokenizer, given.processes)))
        return
    table = Table("rows", "peer", "tokens", "seconds", "tokens/s", "MB, main", "MB, a worker")
    quiet = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        for rows in given.rows:
            path = Path(folder) / f"{rows}.jsonl"
            write_chats(path, rows)
            for peer in given.peers:
                command = [sys.executable, __file__, "--only", peer, str(path), "--tokenizer", given.tokenizer]
                command += ["--processes", str(given.processes)]
                run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=quiet)
                found = json.loads(run.stdout.splitlines()[-1])
                speed = found["tokens"] / found["seconds"]
                figures = (speed, found["main"], found["worker"])
                table.add_row(
                    f"{rows:,}",
                    peer,
                    f"{found['tokens']:,}",
                    f"{found['seconds']:.1f}",
                    *(f"{x:,.0f}" for x in figures),
                )
    Console(width=100).print(table)
    print("MB: the highest use of memory, of the process that was started and of one that it started to tokenise.")


if __name__ == "__main__":
    main()
