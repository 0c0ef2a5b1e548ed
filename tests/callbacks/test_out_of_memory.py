"""An out-of-memory error names the batch, its lengths and the remedies."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

import phi3_lightning
import synthetic
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.callbacks import OutOfMemory
from phi3_lightning.planning.memory import MemoryPredictor
from phi3_lightning.planning.step import BatchShape

TINY = Path(phi3_lightning.__file__).parent / "assets" / "tiny_phi3"
LENGTHS = [[60, 30], [40]]


def batch():
    documents = iter(synthetic.document(length, length // 2, length) for row in LENGTHS for length in row)
    return synthetic.batch_of([[next(documents) for _ in row] for row in LENGTHS])


class Greedy(Phi3LoRAModule):
    """Runs out of memory in one of its steps."""

    where = "training_step"

    def _fail(self, where):
        if where == self.where:
            torch.empty(2**60, dtype=torch.uint8)

    def training_step(self, batch, batch_idx):
        self._fail("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self._fail("validation_step")
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("where", ["training_step", "validation_step"])
def test_the_batch_and_what_helps_are_named(tiny_base, tmp_path, where):
    module = Greedy(tiny_base, gradient_checkpointing="none")
    module.where = where
    trainer = synthetic.trainer(tmp_path, callbacks=[OutOfMemory()], max_steps=1, num_sanity_val_steps=0)
    loader = torch.utils.data.DataLoader([batch()], batch_size=None)
    with pytest.raises(RuntimeError, match="allocate memory") as error:
        trainer.fit(module, loader, loader)
    named, predicted, *changes = error.value.__notes__
    assert named.startswith(f"memory ran out in {where.removesuffix('_step')} batch 0")
    assert named.endswith("2 rows with documents of 60 + 30; 40 tokens")
    memory = MemoryPredictor(module.spec()).memory(BatchShape(LENGTHS, 65))
    assert f"takes {memory.total / 1e9:.1f} GB" in predicted
    assert len(changes) == 3
    assert any("model.gradient_checkpointing: full" in change for change in changes)


class Limited(Phi3LoRAModule):
    """Has memory for a limited number of tokens."""

    limit = 10**9

    def compute_loss(self, hidden, head, batch):
        if hidden.shape[:2].numel() > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().compute_loss(hidden, head, batch)


def chats(tmp_path) -> ChatDataModule:
    options = {"max_length": 256, "packing": False, "batch_size": 1, "num_workers": 0, "val_fraction": 0.0}
    return ChatDataModule(
        train=str(TINY / "chats_train.jsonl"), tokenizer=str(TINY), cache_dir=str(tmp_path / "cache"), **options
    )


@pytest.mark.slow
def test_the_largest_batch_is_tried_before_the_first_step(tmp_path):
    data = chats(tmp_path)
    data.prepare_data()
    data.setup("fit")
    sizes = sorted(batch["input_ids"].numel() for batch in data.train_dataloader())
    assert data.largest_train_batch()["input_ids"].numel() == sizes[-1]
    module = Limited(str(TINY))
    module.limit = sizes[-1] - 1
    trainer = synthetic.trainer(tmp_path, callbacks=[OutOfMemory()], max_steps=1)
    with pytest.raises(torch.OutOfMemoryError) as error:
        trainer.fit(module, chats(tmp_path))
    assert trainer.global_step == 0
    assert error.value.__notes__[0].startswith("memory ran out in a trial of the largest training batch: 1 rows")
    without = synthetic.trainer(tmp_path, max_steps=1)
    without.fit(module, chats(tmp_path))  # its first batch is another: the largest might come hours later
    assert without.global_step == 1


def test_training_is_the_same_with_and_without_the_trial(tmp_path):
    found = []
    for callbacks in ([OutOfMemory()], []):
        pl.seed_everything(0)
        module = Phi3LoRAModule(str(TINY), lora={"lora_dropout": 0.1})
        synthetic.trainer(tmp_path, callbacks=callbacks, max_steps=3).fit(module, chats(tmp_path))
        found.append(torch.cat([parameter.detach().flatten() for parameter in module.trained_parameters()]))
    assert torch.equal(*found)


def test_a_prompt_batch_is_named(tiny_base, tmp_path):
    class Wordy(Phi3LoRAModule):
        def predict_step(self, batch, batch_idx):
            raise torch.OutOfMemoryError("CUDA out of memory")

    prompts = {"input_ids": torch.ones(3, 7, dtype=torch.int64)}
    trainer = synthetic.trainer(tmp_path, callbacks=[OutOfMemory()])
    with pytest.raises(torch.OutOfMemoryError) as error:
        trainer.predict(Wordy(tiny_base), torch.utils.data.DataLoader([prompts], batch_size=None))
    assert "3 prompts of 7 tokens" in error.value.__notes__[0]
    assert "data.predict_batch_size" in error.value.__notes__[0]


def test_other_errors_are_left_alone(tiny_base, tmp_path):
    class Wrong(Phi3LoRAModule):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("shapes do not fit")

    trainer = synthetic.trainer(tmp_path, callbacks=[OutOfMemory()], max_steps=1)
    with pytest.raises(RuntimeError, match="shapes") as error:
        trainer.fit(Wrong(tiny_base), torch.utils.data.DataLoader([batch()], batch_size=None))
    assert not hasattr(error.value, "__notes__")
