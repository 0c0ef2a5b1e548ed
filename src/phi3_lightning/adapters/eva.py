"""EVA: initialisation by the directions in which each layer's inputs vary most (https://arxiv.org/abs/2410.07170)."""

import sys
from collections.abc import Callable, Iterable, Iterator
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
    """A batch that PEFT does not move, since parts of it are not tensors."""

    def to(self, device: torch.device) -> "_Placed":
        return self


class _LargeBatches:
    """The batches with at least ``rank`` supervised tokens: with fewer PEFT's search would never end."""

    def __init__(self, batches: Callable[[], Iterable[Batch]], count: int, rank: int) -> None:
        self._batches, self._count, self._rank = batches, count, rank

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[_Placed]:
        empty = True
        for batch in self._batches():
            if int((batch["labels"] != IGNORE_INDEX).sum()) >= self._rank:
                empty = False
                yield _Placed(batch)
        if empty:
            raise ConfigError(
                f"{KEY}: no training batch has {self._rank} supervised tokens, as many as the adapter's rank; raise "
                "data.batch_size, set data.packing: true, or use another start"
            )


def initialize(
    model: nn.Module,
    adapter: Adapter,
    trainer: pl.Trainer,
    in_one_row: Callable[[Batch], Batch],
    run: Callable[[Batch], object],
) -> None:
    """Initialise each ``A`` of a fresh adapter from the training batches, on all ranks alike."""
    strategy, loader = trainer.strategy, cast("DataLoader[Batch]", trainer.train_dataloader)

    def batches() -> Iterator[Batch]:
        return (in_one_row(strategy.batch_to_device(batch)) for batch in loader)

    adapter.set_lora_A(strategy.broadcast(eva_directions(model, adapter, batches, len(loader), run)))


def eva_directions(
    model: nn.Module,
    adapter: Adapter,
    batches: Callable[[], Iterable[Batch]],
    count: int,
    run: Callable[[Batch], object],
) -> dict[str, Tensor]:
    """Find the directions of largest variance of the inputs of each adapted linear layer, at supervised tokens.

    PEFT's own search, by an incremental decomposition that ends when the directions have converged. Every layer keeps
    its rank: PEFT's redistribution of ranks over layers (``rho`` above 1) would make another adapter.

    Args:
        batches: Returns an iteration over ``count`` training batches, each in one row, on the model's device.

    Returns:
        Float32 tensors of shape (largest rank, in) by the paths of the decoder blocks' layers; embedding and head start
        as usual. Empty where the adapter is trained already.
    """
    if any(bool(tensor.any()) for name, tensor in adapter.to_peft().tensors.items() if ".lora_B." in name):
        return {}
    # PEFT searches for linear layers, and the head does not run on all positions
    linear = [target for target in adapter.targets if not target.embedding and target.name != "lm_head"]
    if not linear:
        raise ConfigError(f"{KEY}: no layer of a decoder block is adapted; use true")
    frozen = {_frozen(model, target.path): target.path for target in linear}
    rank = max(target.r for target in linear)
    search = LoraConfig(
        r=rank,
        target_modules=[f"base.{name}" for name in frozen],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0),
    )
    rank_zero_info(f"{KEY}: looking for the {rank} directions in which the inputs of {len(linear)} layers vary most")
    training = model.training
    with torch.random.fork_rng():  # the search seeds torch
        directions = get_eva_state_dict(
            nn.ModuleDict({"base": model}),  # by itself, PEFT would take the model for one of its own
            _LargeBatches(batches, count, rank),
            search,
            forward_fn=lambda _, batch: run(batch),
            gather_distributed_inputs=False,
            show_progress_bar=sys.stderr.isatty(),
        )
    model.train(training)
    return {path: directions[f"base.{name}"].float().contiguous() for name, path in frozen.items()}


def _frozen(model: nn.Module, path: str) -> str:
    """The name of the frozen linear layer, which loralib's layer is itself and PEFT's contains."""
    return path if isinstance(model.get_submodule(path), nn.Linear) else f"{path}.base_layer"
