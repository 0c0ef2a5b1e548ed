"""Our checkpoints on a module that has nothing to do with Phi-3: a frozen backbone, a trained head, exact restarts.

    python examples/checkpoints_of_any_module.py --folder runs/any-module

``TrainableStateMixin`` leaves what is frozen out of checkpoints and refuses those of another backbone;
``RunCheckpoint`` keeps ``last.ckpt`` and ``best.ckpt``; ``SafeCheckpointIO`` writes them under a temporary name and
reads no pickles.
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from phi3_lightning.callbacks import RunCheckpoint
from phi3_lightning.checkpoint.io import SafeCheckpointIO
from phi3_lightning.checkpoint.mixin import TrainableStateMixin


class Classifier(TrainableStateMixin):
    """Two frozen layers under a trained one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(32, 512), nn.Tanh(), nn.Linear(512, 512)).requires_grad_(False)
        self.head = nn.Linear(512, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        features, target = batch
        return nn.functional.cross_entropy(self.head(self.backbone(features)), target)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.head.parameters(), 0.01)


def rows(seed: int) -> DataLoader:
    features = torch.randn(64, 32, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(features, (features.sum(1) > 0).long()), batch_size=8)


def fit(folder: Path, epochs: int, resume: Path | None = None) -> Classifier:
    module = Classifier()
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[RunCheckpoint(str(folder))], plugins=[SafeCheckpointIO()],
    )  # fmt: skip
    trainer.fit(module, rows(1), rows(2), ckpt_path=resume, weights_only=True)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/any-module"))
    given = parser.parse_args()

    fit(given.folder / "stopped", epochs=2)
    last = given.folder / "stopped/last.ckpt"
    state = torch.load(last, weights_only=True)["state_dict"]
    print(
        f"{last}: {sorted(state)}, {last.stat().st_size / 1e3:.0f} kB beside {512 * (32 + 512) * 4 / 1e3:.0f} kB frozen"
    )
    resumed = fit(given.folder / "resumed", epochs=4, resume=last)
    whole = fit(given.folder / "whole", epochs=4)
    same = all(map(torch.equal, resumed.head.parameters(), whole.head.parameters()))
    print(f"stopped and resumed is the same, to the bit, as never stopped: {same}")


if __name__ == "__main__":
    main()
