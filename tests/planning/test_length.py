"""The length of a run is the Trainer's own count."""

import math

import lightning.pytorch as pl
import pytest

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.planning.length import run_length

BATCHES = [synthetic.batch_of([[synthetic.document(6 + index, 3, index)]]) for index in range(7)]
TOKENS = sum(sum(map(sum, batch["document_lengths"])) for batch in BATCHES)


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 2, "max_steps": -1},
        {"max_epochs": 2, "max_steps": -1, "accumulate_grad_batches": 3},
        {"max_epochs": 5, "max_steps": 4, "accumulate_grad_batches": 2},
        {"max_epochs": -1, "max_steps": 9},
        {"max_epochs": 2, "max_steps": -1, "limit_train_batches": 3},
        {"max_epochs": 2, "max_steps": -1, "limit_train_batches": 0.5, "accumulate_grad_batches": 2},
        {"max_epochs": 3, "max_steps": -1, "val_check_interval": 0.4},
        {"max_epochs": 3, "max_steps": 18, "val_check_interval": 3},
        {"max_epochs": 5, "max_steps": -1, "check_val_every_n_epoch": 2},
        {"max_epochs": 2, "max_steps": -1, "val_check_interval": 5, "check_val_every_n_epoch": None},
    ],
)
def test_steps_and_validations_are_those_of_the_trainer(tmp_path, tiny_base, options):
    class Count(pl.Callback):
        validations = 0

        def on_validation_end(self, trainer, pl_module):
            self.validations += 1

    count = Count()
    trainer = synthetic.trainer(tmp_path, callbacks=[count], num_sanity_val_steps=0, **options)
    loader = synthetic.loader(BATCHES)
    trainer.fit(Phi3LoRAModule(tiny_base, dtype="float32"), loader, synthetic.loader(BATCHES[:1]))
    length = run_length(
        len(BATCHES), TOKENS, 1, accumulate=options.get("accumulate_grad_batches", 1),
        max_epochs=options["max_epochs"], max_steps=options["max_steps"], limit=options.get("limit_train_batches"),
        check_val_every_n_epoch=options.get("check_val_every_n_epoch", 1),
        val_check_interval=options.get("val_check_interval"),
    )  # fmt: skip
    assert length.steps == trainer.global_step
    assert length.validations == count.validations


def test_ranks_share_the_batches_of_an_epoch():
    length = run_length(10, 1000, 4, accumulate=1, max_epochs=3, max_steps=-1)
    assert (length.steps, length.tokens) == (9, 3000)


def test_unlimited_runs_are_infinite_and_max_epochs_defaults_to_1000():
    assert run_length(7, 70, 1, accumulate=1, max_epochs=-1, max_steps=-1).steps == math.inf
    assert run_length(7, 70, 1, accumulate=1, max_epochs=None, max_steps=-1).steps == 7000
    assert run_length(7, 70, 1, accumulate=1, max_epochs=None, max_steps=5).tokens == pytest.approx(50)
