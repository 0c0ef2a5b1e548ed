"""One base in memory, and modules with different settings on it, one after the other."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from transformers import Phi3ForCausalLM

from phi3_lightning.config import Objective, Optimizer, Schedule
from phi3_lightning.errors import ModelError
from phi3_lightning.module import Phi3LoRAModule


class SharedBase:
    """Lends modules on one base, which is loaded once; each module gives it back.

    Args:
        module: The user's module, not yet loaded.
        make_trainer: Makes a Trainer on the user's device and precision, with further options.

    Raises:
        ModelError: If the base cannot be loaded, or cannot carry the user's adapter.
    """

    def __init__(self, module: Phi3LoRAModule, make_trainer: Callable[..., pl.Trainer]) -> None:
        self.make_trainer = make_trainer
        self._user_module = module
        self.strategy = make_trainer().strategy
        module.configure_model()
        self._base: Phi3ForCausalLM | None = module.detach_adapter()

    @property
    def base(self) -> Phi3ForCausalLM:
        """The base, while no module has it."""
        if self._base is None:
            raise ModelError("the base is lent to another module")
        return self._base

    @property
    def objective(self) -> Objective:
        """What the user's batches teach."""
        return self._user_module.objective

    @property
    def optimizer(self) -> Optimizer:
        """The user's section ``model.optimizer``."""
        return self._user_module.optimizer_config

    @contextmanager
    def module(self, **changes: Any) -> Iterator[Phi3LoRAModule]:
        """Lend a module with an adapter of its own, in memory until the context ends.

        The learning rate stays constant: a schedule is made for the length of a run. ``changes`` replace the user's
        arguments.
        """
        own = self._user_module
        options = {**own.hparams, "base_id": own.base_id, "lora": own.lora, "schedule": Schedule("constant", 0)}
        module = Phi3LoRAModule(**{**options, **changes, "base": self.base})
        torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", "0")))  # adapters start alike
        module.configure_model()
        self._base = None
        try:
            yield module
        finally:
            self._base = module.detach_adapter()

    @contextmanager
    def context(self, module: Phi3LoRAModule) -> Iterator[None]:
        """Run a module in the context in which the Trainer would run it."""
        with self.strategy.precision_plugin.forward_context(), module.autocast():
            yield
