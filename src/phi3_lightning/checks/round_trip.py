"""A checkpoint, written and read on the way that a run takes, brings everything back to the bit."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from phi3_lightning.batch import Batch
from phi3_lightning.checks.shared_base import SharedBase
from phi3_lightning.module import Phi3LoRAModule


class CheckpointRoundTrip:
    """What a checkpoint is to bring back.

    Args:
        bench: Holds the base.
        module: A trained module.
        trainer: The Trainer that trained it.
        batches: What its loss is measured on.
        path: Where the checkpoint is written.
    """

    def __init__(
        self, bench: SharedBase, module: Phi3LoRAModule, trainer: pl.Trainer, batches: list[Batch], path: Path
    ) -> None:
        self._bench, self._batches, self._path = bench, batches, path
        trainer.save_checkpoint(path)
        self.size = path.stat().st_size
        self._state = _trained(module)
        self._loss = self._validate(module)

    def faults(self, fresh: Phi3LoRAModule) -> list[str]:
        """Read the checkpoint into a fresh module.

        Args:
            fresh: A module that has never been trained.

        Returns:
            What is not as it was.
        """
        untouched = _trained(fresh)
        loss = self._validate(fresh, str(self._path))
        found = _trained(fresh)
        faults = [name for name, tensor in self._state.items() if not torch.equal(tensor, found[name])]
        if loss != self._loss:
            faults.append(f"the loss is {loss!r} and was {self._loss!r}")
        if all(torch.equal(tensor, untouched[name]) for name, tensor in self._state.items()):
            faults.append("training had changed no value")
        return faults

    def _validate(self, module: Phi3LoRAModule, path: str | None = None) -> float:
        loader: DataLoader[Batch] = DataLoader(self._batches, batch_size=None)  # type: ignore[arg-type]
        trainer = self._bench.make_trainer()
        return float(trainer.validate(module, loader, ckpt_path=path, verbose=False)[0]["val/loss"])


def _trained(module: Phi3LoRAModule) -> dict[str, Tensor]:
    return {n: p.detach().cpu().clone() for n, p in module.named_parameters() if p.requires_grad}
