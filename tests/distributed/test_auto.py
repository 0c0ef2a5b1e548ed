"""``auto`` is decided alike on all ranks, whichever has least memory."""

import os
from pathlib import Path

import pytest

import phi3_lightning
from phi3_lightning import ChatDataModule
from phi3_lightning.callbacks import AutoBatchSize, AutoCheckpointing, auto
from phi3_lightning.model.activation_checkpointing import mode_of

from . import cases, ranks

TINY = Path(phi3_lightning.__file__).parent / "assets" / "tiny_phi3"


def decisions(folder, world: int, sizes: list[tuple[float, float]]) -> tuple:
    """Mode, rows of the largest micro-batch, micro-batches per step; each rank has its own amount of memory."""
    free, total = sizes[int(os.environ["LOCAL_RANK"])]
    auto.device_memory = lambda _: (free, total)  # a process of its own
    data = ChatDataModule(
        train=str(TINY / "chats_train.jsonl"), tokenizer=str(TINY), cache_dir=str(folder / "cache"), max_length=256,
        num_workers=0, val_fraction=0.0, batch_size=12, max_tokens_per_batch="auto",
    )  # fmt: skip
    module = cases.module(str(TINY), gradient_checkpointing="auto")
    callbacks = [AutoBatchSize(), AutoCheckpointing()]
    trainer = cases.trainer(folder, "ddp", world, use_distributed_sampler=False, max_steps=1, callbacks=callbacks)
    trainer.fit(module, data)
    return mode_of(module.model), len(data.largest_train_batch()["document_lengths"]), trainer.accumulate_grad_batches


@pytest.mark.slow
def test_the_rank_with_least_memory_decides_auto(tmp_path):
    much, little = (20e9, 20e9), (0.05e9, 3.0e9)
    mixed = ranks.run(tmp_path / "mixed", 2, decisions, tmp_path, 2, [much, little])
    assert mixed[0] == mixed[1]
    (alone,) = ranks.run(tmp_path / "alone", 1, decisions, tmp_path, 1, [much])
    assert alone != mixed[0]
