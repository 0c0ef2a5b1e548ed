"""The checkpoint hooks on a foreign LightningModule."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import synthetic
from phi3_lightning.checkpoint.mixin import TrainableStateMixin
from phi3_lightning.errors import CheckpointError


class FrozenBackbone(TrainableStateMixin):
    """A frozen layer and a trained one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Linear(4, 8).requires_grad_(False)
        self.head = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        return self.head(self.backbone(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.head.parameters(), lr=0.1)


def fit(module: FrozenBackbone, folder, steps: int, ckpt=None) -> pl.Trainer:
    generator = torch.Generator().manual_seed(1)
    data = synthetic.loader([torch.randn(3, 4, generator=generator) for _ in range(8)])
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, accumulate_grad_batches=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
    return trainer


def test_a_checkpoint_holds_the_trained_part_and_reads_back(tmp_path):
    module = FrozenBackbone()
    fit(module, tmp_path, 2).save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == {"head.weight", "head.bias"}
    again = FrozenBackbone.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(again.head.weight, module.head.weight)


def test_a_run_resumes_from_a_checkpoint(tmp_path):
    fit(FrozenBackbone(), tmp_path, 4).save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    resumed = FrozenBackbone()
    assert fit(resumed, tmp_path, 6, tmp_path / "a.ckpt").global_step == 6


def test_another_backbone_is_refused(tmp_path):
    fit(FrozenBackbone(), tmp_path, 1).save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    with pytest.raises(CheckpointError, match="another base model"):
        FrozenBackbone.load_from_checkpoint(tmp_path / "a.ckpt", seed=1, weights_only=True)
