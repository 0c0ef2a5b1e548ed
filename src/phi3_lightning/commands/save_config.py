"""The configuration of a run, in its folder and in its loggers."""

import lightning.pytorch as pl
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
            text = self.parser.dump(config, skip_none=False, skip_validation=True)
            RunFolder.of(config).keep_config(text)
            log_page(trainer, "config", f"<pre>{literal(text)}</pre>", trainer.global_step)
