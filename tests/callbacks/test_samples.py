"""Answers of base and tuned model during training."""

import json
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import phi3_lightning
import synthetic
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.callbacks import Samples
from phi3_lightning.errors import ConfigError
from phi3_lightning.generation import decode

TINY = Path(phi3_lightning.__file__).parent / "assets" / "tiny_phi3"
CHATS = [synthetic.batch_of([[synthetic.document(8, 4, seed)]]) for seed in range(2)]


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def chats(tmp_path, **options) -> ChatDataModule:
    small = {"tokenizer": str(TINY), "max_length": 256, "num_workers": 0, "cache_dir": str(tmp_path / "cache")}
    return ChatDataModule(**{"train": str(TINY / "chats_val.jsonl"), "val_fraction": 0.05} | small | options)


def tiny(**options) -> Phi3LoRAModule:
    return Phi3LoRAModule(str(TINY), optimizer={"lr": 1e-2}, generation={"max_new_tokens": 8}, **options)


def fit(tmp_path, module, data, samples, **options):
    options = {"max_steps": 2, "max_epochs": -1} | options
    trainer = synthetic.trainer(tmp_path, callbacks=[samples], **options)
    trainer.fit(module, data)
    return trainer


def printed_text(capsys) -> str:
    """The printed text on one line, without table borders."""
    return " ".join(re.sub("[\u2500-\u257f]", " ", capsys.readouterr().out).split())


def test_base_and_tuned_answers_stand_side_by_side(tmp_path, capsys):
    data, module = chats(tmp_path, predict=str(TINY / "prompts.jsonl")), tiny()
    fit(tmp_path, module, data, Samples(from_predict=True))
    text = printed_text(capsys)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    row, answer = batch["document_ids"].index(0), module.predict_step(batch, 0)
    tuned = data.tokenizer.decode(answer[row], skip_special_tokens=True)
    prompt = data.tokenizer.decode(
        batch["input_ids"][row][batch["attention_mask"][row].bool()], skip_special_tokens=True
    )
    assert "prompt base tuned" in text
    assert " ".join(tuned.split()) in text
    assert prompt.split()[0] in text.split("tuned")[-1]
    assert module.model.training


class WithoutModelAfterFit(SingleDeviceStrategy):
    """Has no model after fit: on a GPU it has then left the device that batches go to."""

    def teardown(self) -> None:
        super().teardown()
        self.lightning_module.model = None


def test_the_last_answers_are_generated_before_the_model_leaves_its_device(tmp_path, capsys):
    data = chats(tmp_path, predict=str(TINY / "prompts.jsonl"))
    fit(tmp_path, tiny(), data, Samples(from_predict=True), strategy=WithoutModelAfterFit(device="cpu"))
    assert "prompt base tuned" in printed_text(capsys)


def test_prompts_come_from_the_validation_data_where_there_are_no_others(tmp_path, capsys):
    data, module = chats(tmp_path), tiny()
    fit(tmp_path, module, data, Samples(prompts=2), val_check_interval=1)
    text = printed_text(capsys)
    batch = next(iter(data.val_dataloader()))
    first = batch["labels"][0, : batch["document_lengths"][0][0]]
    prompt = batch["input_ids"][0, : int((first != -100).nonzero()[0])]
    assert " ".join(data.tokenizer.decode(prompt, skip_special_tokens=True).split()) in text


def test_both_answers_of_a_pair_have_one_prompt(tmp_path, capsys):
    rows = [{"prompt": f"Is it {hour} o'clock?", "chosen": "Yes.", "rejected": "No."} for hour in range(8)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, module = chats(tmp_path, train=str(path), val_fraction=0.25), tiny(objective={"name": "orpo"})
    fit(tmp_path, module, data, Samples(prompts=4), max_steps=1, val_check_interval=1)
    table = printed_text(capsys).split("prompt base tuned")[-1]
    assert [table.count(f"Is it {hour} o'clock?") for hour in range(8)].count(1) == 2


def test_the_base_answers_once_and_every_validation_is_kept(tmp_path, monkeypatch):
    calls = []
    generate = decode.generate
    monkeypatch.setattr("phi3_lightning.callbacks.samples.generate", lambda *args: calls.append(1) or generate(*args))
    logger = TensorBoardLogger(tmp_path, name="", version="")
    module = tiny()
    fit(tmp_path, module, chats(tmp_path), Samples(prompts=2), val_check_interval=1, logger=logger, max_steps=3)
    assert len(calls) == 1 + 3  # the base once, the tuned model three times; the last validation serves as the end's
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    texts = events.Tensors("samples/text_summary")
    assert [text.step for text in texts] == [0, 1, 2]
    assert "| prompt | base | tuned |" in texts[0].tensor_proto.string_val[0].decode()


def test_samples_do_not_change_training(tmp_path):
    def weights(*callbacks):
        module = tiny(lora={"lora_dropout": 0.3})
        trainer = synthetic.trainer(
            tmp_path, callbacks=list(callbacks), max_steps=3, max_epochs=-1, val_check_interval=1
        )
        torch.manual_seed(0)
        trainer.fit(module, chats(tmp_path))
        return list(module.trained_parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(Samples()), weights(), strict=True))


@pytest.mark.parametrize("samples", [Samples(prompts=0), Samples()])
def test_no_answers_are_shown_without_prompts_or_a_tokenizer(tmp_path, tiny_base, capsys, samples):
    module = Phi3LoRAModule(tiny_base, dtype="float32")
    trainer = synthetic.trainer(tmp_path, callbacks=[samples])
    trainer.fit(module, synthetic.loader(CHATS), synthetic.loader(CHATS))
    assert "answers" not in printed_text(capsys)


@pytest.mark.parametrize(("options", "key"), [({"prompts": -1}, "samples"), ({"max_new_tokens": 0}, "sample_tokens")])
def test_numbers_out_of_range_are_refused(options, key):
    with pytest.raises(ConfigError, match=rf"monitor\.{key}"):
        Samples(**options)
