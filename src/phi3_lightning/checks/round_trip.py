"""A checkpoint, written and read as a run does it, brings everything back to the bit."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from phi3_lightning.batch import Batch
from phi3_lightning.checks.shared_base import SharedBase
from phi3_lightning.module import Phi3LoRAModule


class CheckpointRoundTrip:
    """Writes a checkpoint of a trained module, and remembers its tensors and its loss on some batches."""

    def __init__(
        self, shared_base: SharedBase, module: Phi3LoRAModule, trainer: pl.Trainer, batches: list[Batch], path: Path
    ) -> None:
        self._shared_base, self._batches, self._path = shared_base, batches, path
        trainer.save_checkpoint(path)
        self.size = path.stat().st_size
        self._state = _trained(module)
        self._loss = self._validate(module)

    def faults(self, fresh: Phi3LoRAModule) -> list[str]:
        """Read the checkpoint into a module that has never been trained, and return what is not as it was."""
        untouched = _trained(fresh)
        loss = self._validate(fresh, str(self._path))
        restored = _trained(fresh)
        faults = [name for name, tensor in self._state.items() if not torch.equal(tensor, restored[name])]
        if loss != self._loss:
            faults.append(f"the loss is {loss!r} and was {self._loss!r}")
        if all(torch.equal(tensor, untouched[name]) for name, tensor in self._state.items()):
            faults.append("training had changed no value")
        return faults

    def _validate(self, module: Phi3LoRAModule, path: str | None = None) -> float:
        loader: DataLoader[Batch] = DataLoader(self._batches, batch_size=None)  # type: ignore[arg-type]
        trainer = self._shared_base.make_trainer()
        return float(trainer.validate(module, loader, ckpt_path=path, verbose=False)[0]["val/loss"])


def _trained(module: Phi3LoRAModule) -> dict[str, Tensor]:
    return {n: p.detach().cpu().clone() for n, p in module.named_parameters() if p.requires_grad}
