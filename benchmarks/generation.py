"""Answers to many prompts: this package beside a plain loop over ``model.generate``, on the same model and prompts.

The plain loop is what notebooks do: batches of 4 in the order of the file, padded on the left, each as long as its
longest answer takes. This package sorts prompts by length, answers more of them together, and drops rows that have
ended. Both decode greedily with the same adapter, unmerged. They take turns; seconds are medians, without loading.

Answers end with the chat's end of turn, or as the base's ``generation_config`` says. The tests' real model is made by
``smollm2_to_phi3.py`` of the shared data, from a package of the index: ``python smollm2_to_phi3.py FOLDER``.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig

import phi3_lightning
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.batch import PromptBatch
from phi3_lightning.hardware import peak_memory

CHATS = Path(phi3_lightning.__file__).parent / "assets" / "tiny_phi3" / "chats_train.jsonl"
Answers = dict[int, list[int]]


def load(base: str, prompts: Path, rows: int, tokens: int, batch_size: int, cache: str) -> tuple[Phi3LoRAModule, dict]:
    """The module on its device, and the batches of both ways."""
    chosen = Path(cache) / "prompts.jsonl"
    chosen.write_text("".join(prompts.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]), encoding="utf-8")
    options = {"predict": str(chosen), "tokenizer": base, "num_workers": 0, "cache_dir": cache, "max_length": 256}
    data = ChatDataModule(predict_batch_size=batch_size, **options)
    data.prepare_data()
    data.setup("predict")
    module = Phi3LoRAModule(base, generation={"max_new_tokens": tokens})
    trainer = pl.Trainer(devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module.trainer = trainer
    module.to(trainer.strategy.root_device)
    module.configure_model()
    module.to(trainer.strategy.root_device).eval()
    ours = [move(batch, module.device) for batch in data.predict_dataloader()]
    ends = module.model.generation_config.eos_token_id
    for batch in ours:
        batch["stop_ids"] = sorted({*batch["stop_ids"], *(ends if isinstance(ends, list) else [ends])})
    return module, {"phi3_lightning": ours, "model.generate": in_file_order(ours, 4)}


def move(batch: PromptBatch, device: torch.device) -> PromptBatch:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def in_file_order(batches: list[PromptBatch], size: int) -> list[PromptBatch]:
    """The same prompts as a tokenizer would pad them, in the order of their file."""
    prompts = {
        document_id: ids[mask.bool()]
        for batch in batches
        for document_id, ids, mask in zip(
            batch["document_ids"], batch["input_ids"], batch["attention_mask"], strict=True
        )
    }
    found: list[PromptBatch] = []
    for start in range(0, len(prompts), size):
        rows = sorted(prompts)[start : start + size]
        pad = {"batch_first": True, "padding_side": "left"}
        ids = torch.nn.utils.rnn.pad_sequence([prompts[row] for row in rows], **pad)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(prompts[row]) for row in rows], **pad)
        stop_ids = batches[0]["stop_ids"]
        found.append({"input_ids": ids, "attention_mask": mask, "document_ids": rows, "stop_ids": stop_ids})
    return found


@torch.inference_mode()
def answer_here(module: Phi3LoRAModule, batches: list[PromptBatch]) -> Answers:
    found: Answers = {}
    for index, batch in enumerate(batches):
        found |= dict(zip(batch["document_ids"], module.predict_step(batch, index), strict=True))
    return found


@torch.inference_mode()
def answer_plainly(module: Phi3LoRAModule, batches: list[PromptBatch]) -> Answers:
    found: Answers = {}
    tokens = module.generation.max_new_tokens
    for batch in batches:
        options = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=batch["stop_ids"], pad_token_id=batch["stop_ids"][0]
        )
        with module.autocast():
            sequences = module.model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=options
            )
        for document_id, ids in zip(
            batch["document_ids"], sequences[:, batch["input_ids"].shape[1] :].tolist(), strict=True
        ):
            end = next((index + 1 for index, token in enumerate(ids) if token in batch["stop_ids"]), len(ids))
            found[document_id] = ids[:end]
    return found


WAYS = {"model.generate": answer_plainly, "phi3_lightning": answer_here}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder or hub id of the base model")
    parser.add_argument("--prompts", type=Path, default=CHATS, help="JSON lines of chats or prompts")
    parser.add_argument("--rows", type=int, default=128, help="how many of them")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=32, help="prompts that this package answers together")
    parser.add_argument("--repeats", type=int, default=3, help="times that each way answers all prompts")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as cache:
        module, batches = load(given.base, given.prompts, given.rows, given.max_new_tokens, given.batch_size, cache)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        answers: dict[str, Answers] = {}
        for _ in range(given.repeats):
            for way, answer in WAYS.items():
                start = time.perf_counter()
                answers[way] = answer(module, batches[way])
                seconds[way].append(time.perf_counter() - start)
    table = Table("", "prompts", "batch", "answer tokens", "seconds", "tokens/s")
    for way, size in (("model.generate", 4), ("phi3_lightning", given.batch_size)):
        tokens, median = sum(map(len, answers[way].values())), statistics.median(seconds[way])
        table.add_row(way, str(len(answers[way])), str(size), f"{tokens:,}", f"{median:.1f}", f"{tokens / median:,.0f}")
    console = Console(width=100)
    console.print(table)
    ratio = statistics.median(a / b for a, b in zip(seconds["model.generate"], seconds["phi3_lightning"], strict=True))
    equal = sum(answers["model.generate"][row] == found for row, found in answers["phi3_lightning"].items())
    console.print(
        f"{ratio:.2f} times as fast (median of {given.repeats} pairs); {equal} answers are equal to the token"
    )
    console.print(f"{torch.get_num_threads()} threads, peak memory {peak_memory(module.device) / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
