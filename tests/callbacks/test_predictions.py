"""Answers as JSON lines: whole texts, in the order of the prompts, and never a half-written file."""

import json

import lightning.pytorch as pl
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import synthetic
from phi3_lightning.callbacks import PredictionWriter
from phi3_lightning.contracts import Origin

WORDS = ["<|end|>", "<|user|>", "▁Good", "▁mor", "ning", "▁[b]", "▁ü"]
END, USER, GOOD, MOR, NING, BRACKET, UMLAUT = range(len(WORDS))


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<|end|>"))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<|end|>", "<|user|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


class Prompts(pl.LightningDataModule):
    """Prompts in another order than in their file, as when batches are sorted by length."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = tokenizer()

    def predict_dataloader(self):
        batches = [synthetic.prompt_batch([[GOOD], [MOR]], [END]), synthetic.prompt_batch([[GOOD]], [END])]
        batches[0]["document_ids"], batches[1]["document_ids"] = [2, 0], [1]
        return synthetic.loader(batches)


class Scripted(pl.LightningModule):
    """Answers with given tokens."""

    def __init__(self, *answers: list[list[int]], fail_at: int | None = None) -> None:
        super().__init__()
        self.answers, self.fail_at = answers, fail_at

    def predict_step(self, batch, batch_idx):
        if batch_idx == self.fail_at:
            raise ValueError("out of memory")
        return self.answers[batch_idx]


def predict(folder, *answers, **options) -> list[dict]:
    path = folder / "out" / "predictions.jsonl"
    trainer = synthetic.trainer(folder, callbacks=[PredictionWriter(path)])
    trainer.predict(Scripted(*answers, **options), datamodule=Prompts())
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_are_in_the_order_of_the_prompts(tmp_path):
    rows = predict(tmp_path, [[GOOD, END], [MOR, NING, END]], [[UMLAUT, END]])
    assert [(row["place"], row["answer"]) for row in rows] == [("row 0", "morning"), ("row 1", "ü"), ("row 2", "Good")]


def test_an_answer_is_decoded_as_a_whole_without_special_tokens(tmp_path):
    rows = predict(tmp_path, [[GOOD, MOR, NING, USER, BRACKET, END], [END]], [[]])
    assert [row["answer"] for row in rows] == ["", "", "Good morning [b]"]
    words = [tokenizer().decode([token]) for token in (GOOD, MOR, NING)]
    assert "".join(words) != "Good morning"  # token by token, the space is lost


def test_a_truncated_answer_is_marked(tmp_path):
    rows = predict(tmp_path, [[GOOD, END], [MOR, NING]], [[]])
    assert [row["finished"] for row in rows] == [False, False, True]


def test_a_filler_row_writes_nothing(tmp_path):
    rows = predict(tmp_path, [[GOOD, END], [MOR, END]], [[GOOD, END], [MOR, END]])
    assert [row["place"] for row in rows] == ["row 0", "row 1", "row 2"]


def test_text_is_written_unescaped(tmp_path):
    predict(tmp_path, [[UMLAUT], [UMLAUT]], [[UMLAUT]])
    assert "ü" in (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8")


def test_a_second_run_replaces_the_first(tmp_path):
    predict(tmp_path, [[GOOD], [GOOD]], [[GOOD]])
    assert [row["answer"] for row in predict(tmp_path, [[UMLAUT], [UMLAUT]], [[UMLAUT]])] == ["ü"] * 3
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["predictions.jsonl"]


def test_an_interrupted_run_keeps_the_previous_file_and_its_own_answers(tmp_path):
    former = predict(tmp_path, [[GOOD], [GOOD]], [[GOOD]])
    with pytest.raises(ValueError, match="out of memory"):
        predict(tmp_path, [[UMLAUT], [UMLAUT]], fail_at=1)
    kept = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in kept.splitlines()] == former
    partial = (tmp_path / "out" / "predictions.partial.0.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in partial.splitlines()] == [
        {"place": "row 2", "prompt": "Good", "answer": "ü", "finished": False},
        {"place": "row 0", "prompt": "mor", "answer": "ü", "finished": False},
    ]
    predict(tmp_path, [[GOOD], [GOOD]], [[GOOD]])
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["predictions.jsonl"]


def test_answers_are_on_the_disk_as_soon_as_a_batch_is_answered(tmp_path):
    """A killed process has no chance to write them later."""
    seen = []

    class Look(pl.Callback):
        def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            partial = tmp_path / "predictions.partial.0.jsonl"
            seen.append(partial.read_text(encoding="utf-8").count("\n") if partial.exists() else None)

    trainer = synthetic.trainer(tmp_path, callbacks=[PredictionWriter(tmp_path / "predictions.jsonl"), Look()])
    trainer.predict(Scripted([[GOOD], [GOOD]], [[GOOD]]), datamodule=Prompts())
    assert seen == [None, 2]


class Located(Prompts):
    """Prompts with the origins of their rows."""

    def origins(self, stage, document_ids):
        known = [Origin("p.jsonl:1", "a7"), Origin("p.jsonl:3", 7), Origin("q.csv row 2")]
        assert stage == "predict"
        return [known[row] for row in document_ids]

    def test_facts(self):
        return {}


def test_a_line_has_source_id_and_prompt_of_its_row(tmp_path):
    writer = PredictionWriter(tmp_path / "predictions.jsonl")
    module = Scripted([[GOOD, END], [MOR]], [[UMLAUT, END]])
    synthetic.trainer(tmp_path, callbacks=[writer]).predict(module, datamodule=Located())
    assert [json.loads(line) for line in writer.path.read_text(encoding="utf-8").splitlines()] == [
        {"place": "p.jsonl:1", "id": "a7", "prompt": "mor", "answer": "mor", "finished": False},
        {"place": "p.jsonl:3", "id": 7, "prompt": "Good", "answer": "ü", "finished": True},
        {"place": "q.csv row 2", "prompt": "Good", "answer": "Good", "finished": True},
    ]
