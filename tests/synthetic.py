"""Small synthetic models and batches."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Phi3Config, Phi3ForCausalLM

from phi3_lightning.accumulation import TokenWeightedModule
from phi3_lightning.batch import IGNORE_INDEX, Batch, PromptBatch

VOCABULARY = 97


def tiny_config(**changes) -> Phi3Config:
    """A Phi-3 of 25,000 parameters: two layers, grouped queries."""
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return Phi3Config(**options | changes)


def save_tiny(folder: Path, dtype: torch.dtype = torch.float32, **changes) -> str:
    """Write a random tiny Phi-3 and return its folder."""
    torch.manual_seed(7)
    Phi3ForCausalLM(tiny_config(**changes)).to(dtype).save_pretrained(folder)
    return str(folder)


def document(length: int, supervised: int, seed: int) -> tuple[list[int], list[int]]:
    """Random ids, and labels on the last ``supervised`` of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
    labels = [IGNORE_INDEX] * (length - supervised) + ids[length - supervised :]
    return ids, labels


def batch_of(rows: list[list[tuple[list[int], list[int]]]], first_id: int = 0, pad: int = 0) -> Batch:
    """A batch whose rows hold the given documents."""
    width = max(2, *(sum(len(ids) for ids, _ in row) for row in rows))
    batch: Batch = {
        "input_ids": torch.full((len(rows), width), pad),
        "labels": torch.full((len(rows), width), IGNORE_INDEX),
        "position_ids": torch.zeros((len(rows), width), dtype=torch.int64),
        "document_lengths": [[len(ids) for ids, _ in row] for row in rows],
        "document_ids": [],
    }
    for index, row in enumerate(rows):
        start = 0
        batch["document_ids"].append(list(range(first_id, first_id + len(row))))
        first_id += len(row)
        for ids, labels in row:
            end = start + len(ids)
            batch["input_ids"][index, start:end] = torch.tensor(ids)
            batch["labels"][index, start:end] = torch.tensor(labels)
            batch["position_ids"][index, start:end] = torch.arange(len(ids))
            start = end
    return batch


def pair(prompt: int, chosen: int, rejected: int, seed: int) -> tuple[tuple[list[int], list[int]], ...]:
    """Two documents of one prompt, whose answers of random ids are supervised."""
    ids = document(prompt, 0, seed)[0]
    answers = [document(length, length, 1000 * (seed + 1) + side)[0] for side, length in enumerate((chosen, rejected))]
    return tuple((ids + answer, [IGNORE_INDEX] * prompt + answer) for answer in answers)


def pairs_of(rows: list[list[tuple]], first_id: int = 0, pad: int = 0) -> Batch:
    """A batch whose rows hold the given pairs, which share their prompts."""
    batch = batch_of([[document for each in row for document in each] for row in rows], pad=pad)
    ids = iter(range(first_id, first_id + sum(map(len, rows))))
    batch["document_ids"] = [[pair_id for pair_id in [next(ids) for _ in row] for _ in range(2)] for row in rows]
    batch["preferred"] = [[True, False] * len(row) for row in rows]
    batch["shared_lengths"] = [
        [shared for each in row for shared in (0, min(labels.count(IGNORE_INDEX) for _, labels in each) - 1)]
        for row in rows
    ]
    return batch


def labelled_of(rows: list[list[tuple]], good: list[list[bool]], first_id: int = 0, pad: int = 0) -> Batch:
    """A batch of answers that are good or bad by themselves."""
    return batch_of(rows, first_id, pad) | {"preferred": good}


def loader(batches: list[Batch]) -> DataLoader:
    """A loader of the given batches, in this order."""
    return DataLoader(batches, batch_size=None)


class FromProgress:
    """A loader that resumes where the trainer does, which is known when the first batch is taken."""

    def __init__(self, batches: list[Batch], trainer: pl.Trainer) -> None:
        self.batches = batches
        self.trainer = trainer

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        yield from self.batches[self.trainer.fit_loop.epoch_loop.batch_progress.current.ready :]

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def prompt_batch(prompts: list[list[int]], stop_ids: list[int], pad: int = 0) -> PromptBatch:
    """Left-padded prompts."""
    width = max(len(prompt) for prompt in prompts)
    padding = [[pad] * (width - len(prompt)) for prompt in prompts]
    return {
        "input_ids": torch.tensor([left + prompt for left, prompt in zip(padding, prompts, strict=True)]),
        "attention_mask": torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        "document_ids": list(range(len(prompts))),
        "stop_ids": stop_ids,
    }


def trainer(folder: Path, **options) -> pl.Trainer:
    """A Trainer on the CPU that writes and prints nothing by default."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"enable_checkpointing": False, "max_epochs": 1} | options
    return pl.Trainer(accelerator="cpu", default_root_dir=folder, **quiet | options)


def randomised(module: TokenWeightedModule, std: float = 0.05) -> TokenWeightedModule:
    """Give every trained weight a value: with the zeros that LoRA's B starts from, half of the gradient is hidden."""
    module.configure_model()
    torch.manual_seed(11)
    for parameter in module.trained_parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module


def attention_by_mask(q, k, v, q_bounds, k_bounds, _longest_q, _longest_k, *, scale, window_size):
    """What torch's flash attention computes on a GPU, by a mask over the row; the last query is on the last key."""

    def of(states, bounds):
        """The document of each token, and how far it is from the document's end."""
        place = torch.arange(len(states))
        document = (place[:, None] >= bounds[None, 1:]).sum(1)
        return document, bounds[1:][document] - place

    (q_document, q_left), (k_document, k_left) = of(q, q_bounds), of(k, k_bounds)
    behind = k_left[None] - q_left[:, None]
    seen = (q_document[:, None] == k_document[None]) & (behind >= 0)
    left, right = window_size
    assert right == 0
    if left >= 0:
        seen = seen & (behind <= left)
    q, k, v = (states.transpose(0, 1) for states in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(0, 1)
