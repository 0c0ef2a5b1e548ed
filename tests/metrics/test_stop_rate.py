"""The stop rate: it falls where labels have no ends of turns, which other metrics hardly show."""

import json

import pytest
import torch
from transformers import AutoTokenizer, Phi3ForCausalLM

import synthetic
from cli.conftest import TINY
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.batch import IGNORE_INDEX
from phi3_lightning.callbacks import EvaluationReport

END = "<|end|>"


@pytest.fixture(scope="module")
def endless_base(tmp_path_factory) -> str:
    """The tiny model as if it had never seen ``<|end|>``: with rows at right angles to those that it was trained to."""
    folder = str(tmp_path_factory.mktemp("endless") / "base")
    model, tokenizer = Phi3ForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    for layer in (model.get_input_embeddings(), model.lm_head):
        rows, end = layer.weight.data, tokenizer.convert_tokens_to_ids(END)
        old = rows[end].float()
        new = torch.randn(len(old), generator=torch.Generator().manual_seed(0))
        new -= (new @ old) / (old @ old) * old
        rows[end] = new * old.norm() / new.norm()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class WithoutEnds(Phi3LoRAModule):
    """Learns from labels whose end of turn was taken for padding."""

    def training_step(self, batch, batch_idx):
        end = self.trainer.datamodule.tokenizer.convert_tokens_to_ids(END)
        batch["labels"][batch["labels"] == end] = IGNORE_INDEX
        return super().training_step(batch, batch_idx)


@pytest.mark.slow
def test_the_stop_rate_tells_a_model_that_never_learnt_to_end(endless_base, tmp_path):
    rates = {}
    for kind in (Phi3LoRAModule, WithoutEnds):
        data = ChatDataModule(
            train=f"{TINY}/chats_train.jsonl", test=f"{TINY}/chats_val.jsonl", val_fraction=0.0,
            tokenizer=endless_base, max_length=256, packing=False, batch_size=8, num_workers=0,
            cache_dir=str(tmp_path / "cache"), seed=0,
        )  # fmt: skip
        module = kind(
            endless_base, gradient_checkpointing="none", generation={"max_new_tokens": 48},
            optimizer={"lr": 0.01}, schedule={"warmup": 2},
        )  # fmt: skip
        folder = tmp_path / kind.__name__
        report = EvaluationReport(folder, rows=12, resamples=100)
        trainer = synthetic.trainer(folder, callbacks=[report], max_steps=120, limit_val_batches=0)
        trainer.fit(module, datamodule=data)
        trainer.test(module, datamodule=data, verbose=False)
        metrics = json.loads((folder / "test.json").read_text(encoding="utf-8"))["metrics"]
        rates[kind] = metrics["stop_rate"]["tuned"]["value"], metrics["stop_rate"]["base"]["value"]
        assert metrics["loss"]["tuned"]["value"] < metrics["loss"]["base"]["value"]
    assert rates[Phi3LoRAModule][0] >= 10 / 12
    assert rates[WithoutEnds][0] <= 2 / 12
    assert rates[Phi3LoRAModule][1] == rates[WithoutEnds][1] < 0.5  # the same base, which now and then ends a text
