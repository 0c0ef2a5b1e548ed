"""A search over hyper-parameters by Optuna, on one frozen base that is loaded once; poor trials end early.

    pip install 'optuna>=4'
    python examples/search.py --base FOLDER --chats chats.jsonl --trials 20 --steps 200
    tensorboard --logdir search

Each trial is a TensorBoard run. The tab HParams has a line for each, with its settings, its last validation loss and
the step at which it ended.
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import optuna
from lightning.pytorch.loggers import TensorBoardLogger

from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.callbacks import RunCheckpoint
from phi3_lightning.model import base as base_model

TINY = "src/phi3_lightning/assets/tiny_phi3"


class Pruning(pl.Callback):
    """Reports each validation loss to a trial, and ends the fit if the trial is worse than earlier ones were there."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial
        self.pruned = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.trial.report(trainer.callback_metrics["val/loss"].item(), trainer.global_step)
        self.pruned = self.trial.should_prune()
        # not an exception, which would leave checkpoint and logger half-finished
        trainer.should_stop = trainer.should_stop or self.pruned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=TINY)
    parser.add_argument("--chats", default=f"{TINY}/chats_train.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("search"))
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps of a trial that is not pruned")
    parser.add_argument("--validations", type=int, default=4, help="of such a trial; each may prune it")
    parser.add_argument("--lr", type=float, nargs=2, default=[1e-4, 3e-2], help="lowest and highest")
    options = parser.parse_args()

    base = base_model.load(options.base)

    def objective(trial: optuna.Trial) -> float:
        r = trial.suggest_categorical("r", [4, 8, 16, 32])
        lr = trial.suggest_float("lr", *options.lr, log=True)
        dropout = trial.suggest_float("lora_dropout", 0.0, 0.1, step=0.05)
        pl.seed_everything(42, verbose=False)
        name = f"trial-{trial.number:03d}"
        logger = TensorBoardLogger(options.folder, name=name, version="", default_hp_metric=False)
        module = Phi3LoRAModule(
            base, lora={"r": r, "lora_alpha": 2 * r, "lora_dropout": dropout}, optimizer={"lr": lr},
            gradient_checkpointing="none",
        )  # fmt: skip
        data = ChatDataModule(train=options.chats, tokenizer=options.base, max_length=512, batch_size=2, num_workers=0)
        pruning = Pruning(trial)
        trainer = pl.Trainer(
            max_steps=options.steps, max_epochs=-1, check_val_every_n_epoch=None,
            val_check_interval=max(1, options.steps // options.validations), num_sanity_val_steps=0,
            accelerator="auto", devices=1, logger=logger, log_every_n_steps=1,
            callbacks=[pruning, RunCheckpoint(str(options.folder / name))],
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        try:
            trainer.fit(module, data)
        finally:
            module.detach_adapter()  # the base again, every weight as it was loaded
        loss = trainer.callback_metrics["val/loss"].item()
        logger.log_hyperparams(trial.params, {"val/loss": loss, "steps": trainer.global_step})
        logger.finalize("success")
        if pruning.pruned:
            raise optuna.TrialPruned
        return loss

    # a trial may be pruned once three have ended, if it is worse than their median at the same step
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=42), pruner=optuna.pruners.MedianPruner(n_startup_trials=3)
    )
    study.optimize(objective, n_trials=options.trials)
    pruned = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in study.trials)
    print(f"{len(study.trials)} trials, {pruned} of them pruned")
    folder = options.folder / f"trial-{study.best_trial.number:03d}"
    print(f"best: {study.best_value:.4f}  {study.best_params}  {folder}")


if __name__ == "__main__":
    main()
