"""Checkpoints without frozen weights, for any LightningModule with a frozen base."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Self

import lightning.pytorch as pl
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from phi3_lightning.checkpoint import averaging, resume
from phi3_lightning.checkpoint.callback_state import OPTIONS, keep_options, plain_options
from phi3_lightning.checkpoint.identity import (
    IDENTITY,
    Mismatch,
    check_identity,
    check_moments,
    check_state,
    identity,
    plain_name,
    without_frozen,
)
from phi3_lightning.contracts import PlannedData, data_module
from phi3_lightning.errors import CheckpointError, ModelError
from phi3_lightning.model.base import fingerprint
from phi3_lightning.renamed import translate

__all__ = ["TrainableStateMixin"]


class TrainableStateMixin(pl.LightningModule):
    """A LightningModule whose checkpoints leave out its frozen parameters, and restart exactly.

    Its ``state_dict`` holds what training can change, wherever Lightning or torch asks for it, and a copy of it shares
    the frozen parameters. Modules are built in the constructor or in ``configure_model``, which may run more than once.
    """

    on_mismatch: Mismatch = "refuse"
    """Whether a checkpoint of another base, tokenizer or adapter is an error, or a warning."""

    def __init__(self) -> None:
        super().__init__()
        self._callback_options: dict[str, dict[str, Any]] = {}
        self.register_state_dict_post_hook(_leave_out_frozen)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo |= {id(parameter): parameter for parameter in self.parameters() if not parameter.requires_grad}
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        return copied

    def checkpoint_identity(self) -> dict[str, Any]:
        """Return what ties a checkpoint to the frozen parameters; a subclass may add names."""
        return identity(None, fingerprint(self), {}, {})

    def _identity(self) -> dict[str, Any]:
        """The identity block, with what the datamodule adds."""
        data = None if self._trainer is None else data_module(self._trainer)
        return self.checkpoint_identity() | (data.checkpoint_identity() if isinstance(data, PlannedData) else {})

    def _frozen_names(self) -> set[str]:
        return {
            name for name, parameter in self.named_parameters(remove_duplicate=False) if not parameter.requires_grad
        }

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> set[str]:
        """The frozen parameters, which DDP need not send at its start, since every rank has read them."""
        return self._frozen_names()

    def setup(self, stage: str) -> None:
        """Record the options of the callbacks, and restrict averaging callbacks to trained weights."""
        if stage == "fit":
            self._callback_options = plain_options(self.trainer)
            averaging.check_averaging(self.trainer)
            averaging.average_trained_alone(self.trainer, self)

    def on_fit_start(self) -> None:
        """Refuse frozen weights that differ between ranks: each rank reads its own, and nothing synchronises them."""
        if self._trainer is not None and self.trainer.world_size > 1:
            identity_block = self._identity()
            own = [identity_block["fingerprint"], identity_block.get("reference")]
            if self.trainer.strategy.broadcast(own) != own:
                raise ModelError(
                    f"rank {self.global_rank} has other frozen weights than rank 0; give every node the same files, or "
                    "the same revision of the hub"
                )

    def on_train_start(self) -> None:
        """Set the step of loggers to the one that was reached."""
        resume.align_steps(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave frozen weights out, add their identity, and move the position to where a run resumes exactly."""
        averaging.settle_averages(self.trainer, checkpoint)
        for key in {"state_dict", averaging.CURRENT} & checkpoint.keys():
            checkpoint[key] = {plain_name(name): tensor for name, tensor in self._trained(checkpoint[key]).items()}
        checkpoint[IDENTITY] = self._identity()
        checkpoint[OPTIONS] = self._callback_options
        resume.align_loops(self.trainer, checkpoint["loops"])

    def _trained(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return without_frozen(state, self._frozen_names())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base or adapter before anything of it is used."""
        translate(checkpoint)
        self.configure_model()
        check_identity(checkpoint, self._identity(), self.on_mismatch)
        if averaging.CURRENT in checkpoint:
            checkpoint[averaging.CURRENT] = self._trained(checkpoint[averaging.CURRENT])
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        if "optimizer_states" not in checkpoint:
            raise CheckpointError(
                "the checkpoint was saved with save_weights_only and has no optimiser state to resume from; validate, "
                "test and predict take it, and fit needs a full checkpoint"
            )
        check_moments(checkpoint["optimizer_states"])
        resume.reshard_progress(self.trainer, checkpoint)
        averaging.choose_weights(self.trainer, checkpoint)
        keep_options(self.trainer, checkpoint)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Load what training can change, once the model is built; frozen weights are neither read nor written."""
        self.configure_model()
        expected, frozen = self.state_dict(), self._frozen_names()
        compiled = {plain_name(name): name for name in expected}
        state_dict = {compiled.get(plain_name(name), name): tensor for name, tensor in state_dict.items()}
        if strict:
            check_state(state_dict, expected)
        keys = super().load_state_dict(without_frozen(state_dict, frozen), strict=False, assign=assign)
        return _IncompatibleKeys([key for key in keys.missing_keys if key not in frozen], keys.unexpected_keys)


def _leave_out_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Take the frozen weights of a module out of a state dictionary that may hold other modules' too."""
    frozen = {f"{prefix}{name}" for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    for name in state.keys() - without_frozen(state, frozen).keys():
        del state[name]
