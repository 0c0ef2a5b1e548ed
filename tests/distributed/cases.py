"""Functions that the ranks of these tests run, and that a single process runs for comparison."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed.tensor import DTensor

import synthetic
from phi3_lightning import FSDP2Strategy, Phi3LoRAModule
from phi3_lightning.batch import Batch
from phi3_lightning.checkpoint.io import SafeCheckpointIO
from phi3_lightning.data.sampler import BatchLoader

SUPERVISED = [1, 500, 3, 40, 25, 2, 110, 7]
DOCUMENTS = [synthetic.document(count + 4, count, seed) for seed, count in enumerate(SUPERVISED)]
EMPTY = synthetic.batch_of([[([5, 5], [-100, -100])]])
EPSILON = torch.finfo(torch.float32).eps


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class RecordSteps(pl.Callback):
    """Records the gradients that other callbacks see before each step, and the weights after the run."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.names: list[str] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(torch.cat([whole(p.grad).flatten() for p in pl_module.trained_parameters()]))

    def on_train_batch_end(self, trainer, pl_module, *args):
        if "train/loss" in trainer.callback_metrics:
            self.losses.append(trainer.callback_metrics["train/loss"].item())
            self.norms.append(trainer.callback_metrics["train/grad_norm"].item())


class Sgd(Phi3LoRAModule):
    """Steps in proportion to the gradient, so that any error shows in the weights."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.trained_parameters(), lr=0.1)


def module(base: str, kind: type[Phi3LoRAModule] = Phi3LoRAModule, **options) -> Phi3LoRAModule:
    options = {"dtype": "float32", "lora": {"lora_dropout": 0.0, "r": 4}, "optimizer": {"lr": 1e-2}} | options
    return Randomised.of(kind)(base, schedule={"name": "constant", "warmup": 0}, **options)


class Randomised:
    """Gives every trained weight a value: with the zeros that LoRA's B starts from, half of the gradient is hidden."""

    @staticmethod
    def of(kind: type[Phi3LoRAModule]) -> type[Phi3LoRAModule]:
        class WithValues(kind):
            def on_fit_start(self):
                super().on_fit_start()
                self.give_values()

            def give_values(self):
                generator = torch.Generator().manual_seed(11)
                with torch.no_grad():
                    for parameter in self.trained_parameters():
                        values = torch.randn(parameter.shape, generator=generator) * 0.05
                        if isinstance(parameter, DTensor):
                            mesh, placements = parameter.device_mesh, parameter.placements
                            values = torch.distributed.tensor.distribute_tensor(values, mesh, placements)
                        parameter.copy_(values)

        return WithValues


def fsdp2(**options) -> FSDP2Strategy:
    return FSDP2Strategy(**options)


def trainer(folder: Path, strategy: Any, world: int, **options) -> pl.Trainer:
    options = {"devices": world, "strategy": strategy, "num_sanity_val_steps": 0} | options
    return synthetic.trainer(folder, plugins=[SafeCheckpointIO()], **options)


class RemainingIndices(list[int]):
    """The indices that remain after some were seen, with the length of them all."""

    def __init__(self, count: int, seen: int) -> None:
        super().__init__(range(seen, count))
        self.count = count

    def __len__(self) -> int:
        return self.count


def loader(batches: list[Batch], rank: int, world: int, seen: int = 0) -> BatchLoader:
    """Every ``world``-th batch from ``rank`` on, as BatchOrder assigns them."""
    own = batches[rank::world]
    own += [EMPTY] * (-(-len(batches) // world) - len(own))
    return BatchLoader(own, batch_size=None, sampler=RemainingIndices(len(own), seen), generator=torch.Generator())


def fit(folder: Path, base: str, batches: list[Batch], strategy: Any = "auto", world: int = 1, kind=Phi3LoRAModule,
        model: dict | None = None, **options) -> dict[str, Any]:  # fmt: skip
    """Train on the batches, divided over the ranks, and return what was recorded."""
    import os

    pl.seed_everything(3, verbose=False)
    rank = int(os.environ.get("LOCAL_RANK", "0")) if world > 1 else 0
    strategy = fsdp2(**strategy) if isinstance(strategy, dict) else strategy
    keep, trained = RecordSteps(), module(base, kind, **(model or {}))
    run = trainer(folder, strategy, world, callbacks=[keep], use_distributed_sampler=False, **options)
    run.fit(trained, loader(batches, rank, world))
    return {
        "gradients": keep.gradients,
        "losses": keep.losses,
        "norms": keep.norms,
        "weights": torch.cat([whole(p).flatten() for p in trained.trained_parameters()]),
        "fingerprint": trained._fingerprint,
        "attention": trained.model.config._attn_implementation,
    }
