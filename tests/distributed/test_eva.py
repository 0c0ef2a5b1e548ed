"""EVA initialisation is the same on all ranks, though each has seen other rows."""

import torch

import synthetic
from phi3_lightning import Phi3LoRAModule

from . import cases, ranks

BATCHES = [synthetic.batch_of([[synthetic.document(12, 8, seed)]], seed) for seed in range(6)]


def start(base: str, folder, rank_count: int) -> torch.Tensor:
    import os

    module = Phi3LoRAModule(base, dtype="float32", lora={"r": 4, "init_lora_weights": "eva"}, optimizer={"lr": 1e-9})
    trainer = cases.trainer(folder, "ddp", rank_count, use_distributed_sampler=False, max_steps=1)
    trainer.fit(module, cases.loader(BATCHES, int(os.environ["LOCAL_RANK"]), rank_count))
    return torch.cat([parameter.detach().flatten() for parameter in module.trained_parameters()])


def test_every_rank_starts_from_the_directions_of_all_rows(base, tmp_path):
    first, second = ranks.run(tmp_path, 2, start, base, tmp_path, 2)
    assert torch.equal(first, second)
    (alone,) = ranks.run(tmp_path / "alone", 1, start, base, tmp_path, 1)
    assert (alone - first).abs().max() > 1e-3  # computed from all rows, not only those of rank 0
