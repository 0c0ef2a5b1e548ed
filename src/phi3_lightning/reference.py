"""The reference of a preference objective: the model as the run began."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from xxhash import xxh3_128_digest

from phi3_lightning.adapters.adapter import Adapter
from phi3_lightning.batch import Batch
from phi3_lightning.checkpoint.identity import check_state
from phi3_lightning.distributed.collectives import all_gather_object
from phi3_lightning.errors import CheckpointError


class Reference:
    """The model as the run began.

    It is the base, with the adapter switched off, where a fresh adapter started without effect, and otherwise a frozen
    copy of what is trained. It is never a second base.
    """

    def __init__(self) -> None:
        self._copy: dict[str, nn.Parameter] = {}
        self._losses: dict[bytes, Tensor] = {}
        self.fingerprint: str | None = None
        """A hash of every bit of the copy; None where the reference is the base."""

    def set(self, state: Mapping[str, Tensor]) -> None:
        """Copy tensors, by the names of a module's parameters; without any, the reference is the base."""
        self._copy = {
            name: nn.Parameter(tensor.detach().clone(), requires_grad=False) for name, tensor in state.items()
        }
        self.fingerprint = _hash(state)
        self.forget_losses()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the copied tensors; empty where the reference is the base."""
        return {name: tensor.detach() for name, tensor in self._copy.items()}

    def load(self, state: Mapping[str, Tensor], module: nn.Module, fingerprint: str | None) -> None:
        """Take the tensors of a checkpoint, whose hash is in its identity.

        Raises:
            CheckpointError: If a tensor is missing or unexpected, or a bit is not as it was written.
        """
        if fingerprint is not None:
            check_state(state, trained_weights(module))
        if _hash(state) != fingerprint:
            raise CheckpointError(
                "the checkpoint's reference, against which model.objective measures, is not as it was written; give "
                "another checkpoint, such as best.ckpt beside it"
            )
        self.set(state)

    def losses(self, batch: Batch, compute: Callable[[], Tensor]) -> Tensor:
        """Return what ``compute`` does, the loss of each document of a batch by the reference, but call it once.

        Batches are composed once, and later epochs and validations bring the same ones again. What is kept is what
        would be computed, to the bit, so checkpoints do not need it.
        """
        key = _content(batch)
        if key not in self._losses:
            self._losses[key] = compute().cpu()
        return self._losses[key].to(batch["input_ids"].device)

    def share_losses(self, trainer: pl.Trainer) -> None:
        """Give each rank what the others have computed; every rank calls this."""
        for losses in all_gather_object(trainer, self._losses):
            self._losses |= losses

    def forget_losses(self) -> None:
        """Compute the losses of each batch again."""
        self._losses = {}

    @contextmanager
    def active(self, module: nn.Module, adapter: Adapter) -> Iterator[None]:
        """Let a module compute what the reference does, without dropout and gradients, while the context lasts."""
        device = next(iter(adapter.parameters())).device
        for parameter in self._copy.values():
            parameter.data = parameter.data.to(device)
        with torch.no_grad(), evaluating(module), _replaced(module, self._copy) if self._copy else adapter.disabled():
            yield


def trained_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module that is in training mode into evaluation mode while the context lasts."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _replaced(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Put parameters in the place of a module's own while the context lasts.

    Not their values alone: autocast keeps what it has cast of a trained parameter.
    """
    own = _swap(module, parameters)
    try:
        yield
    finally:
        _swap(module, own)


def _swap(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Put parameters in the place of others; return the others."""
    others = {}
    for name, parameter in parameters.items():
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        others[name] = owner.get_parameter(last)
        setattr(owner, last, parameter)
    return others


def _content(batch: Batch) -> bytes:
    """A hash of the documents of a batch, and of how they lie in it."""
    tensors = (batch["input_ids"], batch["labels"])
    bits = b"".join(tensor.cpu().contiguous().numpy().tobytes() for tensor in tensors)
    return xxh3_128_digest(bits + repr((batch["document_lengths"], batch.get("shared_lengths"))).encode())


def _hash(state: Mapping[str, Tensor]) -> str | None:
    """A hash of names, shapes, types and every bit; None of nothing."""
    if not state:
        return None
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
