"""A search over adapters on one frozen base in one process: the base is loaded once, and each trial is a run.

    python examples/many_adapters.py --base FOLDER --chats chats.jsonl --rank 4 16 --lr 1e-3 1e-2
    tensorboard --logdir search

TensorBoard's tab HParams has a line for each trial, with its settings and its validation loss.
"""

import argparse
from itertools import product
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.callbacks import RunCheckpoint
from phi3_lightning.model import base as base_model

TINY = "src/phi3_lightning/assets/tiny_phi3"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=TINY)
    parser.add_argument("--chats", default=f"{TINY}/chats_train.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("search"))
    parser.add_argument("--rank", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 1e-2])
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()

    base = base_model.load(given.base)
    results = {}
    for rank, lr in product(given.rank, given.lr):
        pl.seed_everything(42, verbose=False)
        name = f"r{rank}-lr{lr:g}"
        logger = TensorBoardLogger(given.folder, name=name, version="", default_hp_metric=False)
        module = Phi3LoRAModule(
            base, lora={"r": rank, "lora_alpha": 2 * rank}, optimizer={"lr": lr}, gradient_checkpointing="none"
        )
        data = ChatDataModule(train=given.chats, tokenizer=given.base, max_length=512, batch_size=2, num_workers=0)
        trainer = pl.Trainer(
            max_steps=given.steps, max_epochs=-1, val_check_interval=given.steps, check_val_every_n_epoch=None,
            accelerator="auto", devices=1, logger=logger, callbacks=[RunCheckpoint(str(given.folder / name))],
            enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(module, data)
        results[name] = trainer.callback_metrics["val/loss"].item()
        logger.log_hyperparams({"rank": rank, "lr": lr}, {"val/loss": results[name]})
        logger.finalize("success")
        module.detach_adapter()  # the base again, every weight as it was loaded
    for name, loss in sorted(results.items(), key=lambda item: item[1]):
        print(f"{loss:.4f}  {name}  {given.folder / name / 'best.ckpt'}")


if __name__ == "__main__":
    main()
