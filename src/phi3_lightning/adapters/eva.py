"""EVA: initialisation by the directions in which each layer's inputs vary most (https://arxiv.org/abs/2410.07170)."""

import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from peft import EvaConfig, LoraConfig, get_eva_state_dict
from torch import Tensor, nn
from torch.utils.data import DataLoader

from phi3_lightning.adapters.adapter import Adapter
from phi3_lightning.batch import IGNORE_INDEX, Batch
from phi3_lightning.errors import ConfigError

KEY = "model.lora.init_lora_weights: eva"


class _Placed(dict[str, Any]):
    """A batch that PEFT does not move, since it does not hold tensors alone."""

    def to(self, device: torch.device) -> "_Placed":
        return self


class _LargeBatches:
    """The batches with at least ``rank`` supervised tokens: with fewer PEFT's search would never end."""

    def __init__(self, loader: DataLoader[Batch], place: Callable[[Batch], Batch], rank: int) -> None:
        self._loader, self._place, self._rank = loader, place, rank

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[_Placed]:
        empty = True
        for batch in self._loader:
            if int((batch["labels"] != IGNORE_INDEX).sum()) >= self._rank:
                empty = False
                yield _Placed(self._place(batch))
        if empty:
            raise ConfigError(
                f"{KEY}: no training batch has {self._rank} supervised tokens, as many as the adapter's rank; raise "
                "data.batch_size, set data.packing: true, or use another initialisation"
            )


def initialize(
    model: nn.Module,
    adapter: Adapter,
    trainer: pl.Trainer,
    in_one_row: Callable[[Batch], Batch],
    run: Callable[[Batch], object],
) -> None:
    """Initialise each ``A`` of a fresh adapter from the training batches, on all ranks alike."""

    def place(batch: Batch) -> Batch:
        return in_one_row(trainer.strategy.batch_to_device(batch))

    directions = eva_directions(model, adapter, cast("DataLoader[Batch]", trainer.train_dataloader), place, run)
    adapter.set_lora_A(trainer.strategy.broadcast(directions))


def eva_directions(
    model: nn.Module,
    adapter: Adapter,
    loader: DataLoader[Batch],
    place: Callable[[Batch], Batch],
    run: Callable[[Batch], object],
) -> dict[str, Tensor]:
    """Find the directions of largest variance of the inputs of each adapted linear layer, at supervised tokens.

    PEFT's own search, by an incremental decomposition that ends when the directions have converged. Every layer keeps
    its rank: PEFT's redistribution of ranks over layers (``rho`` above 1) would make another adapter. The directions
    are float32, shape (largest rank, in), by the path of the layer; there are none where the adapter is trained
    already, nor for embedding and head, which start as usual. ``place`` lays a batch out in one row, on the model's
    device.
    """
    if any(bool(tensor.any()) for name, tensor in adapter.to_peft().tensors.items() if ".lora_B." in name):
        return {}
    # PEFT searches for linear layers, and the head does not run on all positions
    linear = [target for target in adapter.targets if not target.embedding and target.name != "lm_head"]
    if not linear:
        raise ConfigError(f"{KEY}: no layer of a decoder block is adapted; use true")
    # loralib's layer is the frozen one, and PEFT's contains it
    layers = ((target.path, model.get_submodule(target.path)) for target in linear)
    frozen = {path if isinstance(layer, nn.Linear) else f"{path}.base_layer": path for path, layer in layers}
    rank = max(target.r for target in linear)
    search = LoraConfig(
        r=rank,
        target_modules=[f"base.{name}" for name in frozen],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0),
    )
    rank_zero_info(f"{KEY}: searching for the {rank} directions in which the inputs of {len(linear)} layers vary most")
    training = model.training
    with torch.random.fork_rng():  # the search seeds torch
        directions = get_eva_state_dict(
            nn.ModuleDict({"base": model}),  # by itself, PEFT would take the model for one of its own
            _LargeBatches(loader, place, rank),
            search,
            forward_fn=lambda _, batch: run(batch),
            gather_distributed_inputs=False,
            show_progress_bar=sys.stderr.isatty(),
        )
    model.train(training)
    return {path: directions[f"base.{name}"].float().contiguous() for name, path in frozen.items()}
