"""The configuration of a run, in its folder and in its loggers."""

from enum import Enum
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from phi3_lightning.callbacks.tensorboard import literal, log_page
from phi3_lightning.run_folder import RunFolder


class SaveRunConfig(SaveConfigCallback):
    """Writes the user's configuration into the run's folder once training begins."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            config = self.config.clone()
            for key in ("ckpt_path", "resume", "weights_only"):  # of one call, not of the run
                config.pop(key, None)
            text = self.parser.dump(_without_enums(config), skip_none=False, skip_validation=True)
            RunFolder.of(config).keep_config(text)
            log_page(trainer, "config", f"<pre>{literal(text)}</pre>", trainer.global_step)


def _without_enums(value: Any) -> Any:
    """A configuration in which members of enumerations, as the default of ``Timer``, are the words that YAML has."""
    if isinstance(value, Namespace):
        plain = {name: _without_enums(item) for name, item in vars(value).items()}
        return Namespace(plain)  # type: ignore[no-untyped-call]
    if isinstance(value, dict):
        return {name: _without_enums(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_enums(item) for item in value]
    return value.value if isinstance(value, Enum) else value
