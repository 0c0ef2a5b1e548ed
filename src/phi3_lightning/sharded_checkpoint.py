"""Checkpoints in a folder into which each rank writes its own part.

``rank-00000.safetensors`` and so on hold the rows that a rank keeps of each tensor, and ``rest.pt`` the remainder of
the Lightning checkpoint. torch's own distributed checkpoints have a pickled index, which can run code when it is read.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from phi3_lightning.errors import CheckpointError

REST = "rest.pt"
"""File of everything but tensors that are sharded."""


class ShardWriter:
    """Writes a checkpoint beside its final name and renames it when every part is there.

    Args:
        path: The folder.
        rank: This rank.
        ranks: How many there are.
    """

    def __init__(self, path: Path, rank: int, ranks: int) -> None:
        self._path = path
        self._rank = rank
        self._ranks = ranks
        self._temporary = path.with_name(f"{path.name}.tmp")

    def write_own(self, checkpoint: dict[str, Any]) -> None:
        """Write this rank's rows of the sharded tensors.

        Args:
            checkpoint: The checkpoint, as this rank has it.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        own = {name: tensor.to_local().cpu().contiguous() for name, tensor in _sharded(checkpoint)}
        try:
            self._temporary.mkdir(parents=True, exist_ok=True)
            target = self._temporary / _part(self._rank)
            save_file(own, target)
            _flush(target)
        except Exception as error:  # safetensors has its own kind for a full disk
            raise CheckpointError(f"{self._temporary}: rank {self._rank} could not write its part ({error})") from error

    def publish(self, checkpoint: dict[str, Any]) -> None:
        """Write the rest and give the folder its name; on one rank, once every rank has written its part.

        Args:
            checkpoint: The checkpoint, as this rank has it.

        Raises:
            CheckpointError: If the folder cannot be written.
        """
        former = self._path.with_name(f"{self._path.name}.old")
        names = [name for name, _ in _sharded(checkpoint)]
        try:
            torch.save({"parts": self._ranks, "rest": _without(checkpoint, names)}, self._temporary / REST)
            _flush(self._temporary / REST)
            for part in self._temporary.glob("*.safetensors"):  # of a run on more ranks that was cut off here
                if int(part.stem.removeprefix("rank-")) >= self._ranks:
                    part.unlink()
            if self._path.is_dir():
                shutil.rmtree(former, ignore_errors=True)
                self._path.rename(former)
            elif self._path.exists():
                self._path.unlink()
            self._temporary.rename(self._path)
            shutil.rmtree(former, ignore_errors=True)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{self._path}: the checkpoint could not be written ({error})") from error


def is_sharded(path: Path) -> bool:
    """Return whether ``path`` is a checkpoint of this form.

    Args:
        path: A file, a folder, or nothing.
    """
    return (path / REST).is_file()


def read_sharded(path: Path) -> dict[str, Any]:
    """Return a checkpoint with whole tensors, as if it had been written in one file.

    Args:
        path: The folder.

    Raises:
        CheckpointError: If a part is missing or cannot be read.
    """
    try:
        found = torch.load(path / REST, map_location="cpu", weights_only=True)
        parts = [load_file(path / _part(rank)) for rank in range(found["parts"])]
    except Exception as error:  # torch and safetensors raise many kinds for a file that is cut or foreign
        raise CheckpointError(f"{path}: not a whole checkpoint ({type(error).__name__}: {error})") from error
    checkpoint: dict[str, Any] = found["rest"]
    for name in parts[0]:
        holder, key = _holder(checkpoint, name)
        holder[key] = torch.cat([part[name] for part in parts])
    return checkpoint


def _part(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _sharded(checkpoint: dict[str, Any]) -> Iterator[tuple[str, DTensor]]:
    """Sharded tensors and where they are: ``state_dict/NAME``, ``optimizer_states/NUMBER/PARAMETER/KEY``."""
    tensors: dict[str, Tensor] = {f"state_dict/{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    for number, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        for index, values in optimizer["state"].items():
            tensors |= {f"optimizer_states/{number}/{index}/{key}": value for key, value in values.items()}
    return ((name, tensor) for name, tensor in tensors.items() if isinstance(tensor, DTensor))


def _holder(checkpoint: dict[str, Any], name: str) -> tuple[dict[Any, Any], str]:
    """The dictionary in which the tensor of this name belongs, and its key there."""
    where, _, key = name.partition("/")
    if where == "state_dict":
        return checkpoint["state_dict"], key
    number, index, key = key.split("/")
    return checkpoint["optimizer_states"][int(number)]["state"][int(index)], key


def _without(checkpoint: dict[str, Any], names: list[str]) -> dict[str, Any]:
    rest = {**checkpoint, "state_dict": dict(checkpoint["state_dict"])}
    if "optimizer_states" in checkpoint:
        rest["optimizer_states"] = [
            {**optimizer, "state": {index: dict(values) for index, values in optimizer["state"].items()}}
            for optimizer in checkpoint["optimizer_states"]
        ]
    for name in names:
        holder, key = _holder(rest, name)
        del holder[key]
    return rest


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
