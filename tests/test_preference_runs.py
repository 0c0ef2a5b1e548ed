"""Preferences from the rows of a file to an adapter."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.tuner import Tuner

import phi3_lightning
import synthetic
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.callbacks import RunCheckpoint, Throughput, auto
from phi3_lightning.config import Objective
from phi3_lightning.config.objective import USED
from phi3_lightning.errors import ConfigError
from phi3_lightning.preferences import check_data
from phi3_lightning.reference import Reference, trained_weights

TINY = Path(phi3_lightning.__file__).parent / "assets" / "tiny_phi3"
QUESTIONS = [f"Is it {hour} o'clock{', please' * (hour % 3)}?" for hour in range(1, 13)]
METRICS = {"loss", "preference_accuracy", "ranking_accuracy", "reward_margin", "chosen_logp", "rejected_logp"}
ROWS = {
    "chats": [{"prompt": question, "completion": "Yes."} for question in QUESTIONS],
    "pairs": [{"prompt": question, "chosen": "Yes, it is.", "rejected": "No."} for question in QUESTIONS],
    "labelled": [
        {"prompt": question, "completion": answer, "label": answer != "No."}
        for question in QUESTIONS
        for answer in ("Yes, it is.", "No.")
    ],
}


def kind_of(name: str) -> str:
    return {"supervised": "chats", "kto": "labelled"}.get(name, "pairs")


def data(folder: Path, kind: str, **options) -> ChatDataModule:
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
    small = {"max_length": 64, "batch_size": 4, "val_fraction": 0.25, "num_workers": 0}
    return ChatDataModule(
        **{"train": str(path), "tokenizer": str(TINY), "cache_dir": str(folder / "cache")} | small | options
    )


def module(name: str) -> Phi3LoRAModule:
    options = {"dtype": "float32", "optimizer": {"lr": 3e-3}, "gradient_checkpointing": "none"}
    return Phi3LoRAModule(str(TINY), lora={"r": 8, "lora_dropout": 0.0}, objective={"name": name}, **options)


@pytest.mark.parametrize("name", [name for name in USED if name != "supervised"])
def test_an_objective_learns_from_the_rows_of_a_file(tmp_path, name):
    trainer = synthetic.trainer(tmp_path, max_epochs=4)
    trainer.fit(module(name), data(tmp_path, kind_of(name)))
    metrics = trainer.callback_metrics
    assert {f"{stage}/{metric}" for stage in ("train", "val") for metric in METRICS} <= metrics.keys()
    assert all(value.isfinite() for value in metrics.values())
    assert metrics["val/ranking_accuracy"] == 1
    assert metrics["val/reward_margin"] > 0


@pytest.fixture
def passes(monkeypatch):
    """A list that grows with every pass of a reference over a batch."""
    made = []

    @contextmanager
    def counted(reference, *args):
        made.append(reference)
        with active(reference, *args):
            yield

    active = Reference.active
    monkeypatch.setattr(Reference, "active", counted)
    return made


def trained_by(folder: Path, name: str, epochs: int) -> dict[str, torch.Tensor]:
    tuned, rows = module(name), data(folder, kind_of(name))
    synthetic.trainer(folder, max_epochs=epochs, num_sanity_val_steps=0).fit(tuned, rows)
    return {key: value.detach().clone() for key, value in trained_weights(tuned).items()}


@pytest.mark.parametrize(("name", "of_a_batch"), [("dpo", 1), ("kto", 2), ("simpo", 0)])
def test_the_reference_computes_each_batch_once(tmp_path, passes, monkeypatch, name, of_a_batch):
    """Of KTO also the prompts with answers of others. Later epochs and validations have what the first ones had."""
    torch.manual_seed(1)
    trained_by(tmp_path, name, 1)
    first_epoch = len(passes)
    assert bool(first_epoch) == bool(of_a_batch)
    assert first_epoch % max(of_a_batch, 1) == 0
    passes.clear()
    torch.manual_seed(1)
    weights = trained_by(tmp_path, name, 3)
    assert len(passes) == first_epoch

    monkeypatch.setattr(Reference, "losses", lambda self, batch, compute: compute())
    passes.clear()
    torch.manual_seed(1)
    every_time = trained_by(tmp_path, name, 3)
    assert len(passes) == 3 * first_epoch
    assert all(torch.equal(weights[key], every_time[key]) for key in weights)


def test_another_fit_of_the_same_module_computes_the_reference_again(tmp_path, passes):
    tuned, rows = module("dpo"), data(tmp_path, "pairs")
    counts = []
    for _ in range(2):
        synthetic.trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(tuned, rows)
        counts.append(len(passes))
    assert counts == [counts[0], 2 * counts[0]]


def test_nothing_is_kept_of_a_stream(tmp_path, passes):
    trainer = synthetic.trainer(tmp_path, max_epochs=-1, max_steps=6)
    trainer.fit(module("dpo"), data(tmp_path, "pairs", streaming=True, val_fraction=0.0))
    assert len(passes) == 6
    assert not passes[0]._losses


def test_early_stopping_follows_any_metric(tmp_path):
    stops = [EarlyStopping(f"val/{metric}", mode="max") for metric in sorted(METRICS)]
    trainer = synthetic.trainer(tmp_path, max_epochs=1, callbacks=stops)
    trainer.fit(module("dpo"), data(tmp_path, "pairs"))
    assert [stop.best_score for stop in stops] == [trainer.callback_metrics[stop.monitor] for stop in stops]


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_neither_packing_nor_batch_size_changes_what_is_measured(tmp_path, name):
    tuned = synthetic.randomised(module(name))
    results = []
    for options in ({"packing": True}, {"packing": False}, {"packing": False, "batch_size": 1}):
        [result] = synthetic.trainer(tmp_path).validate(tuned, data(tmp_path, "pairs", **options), verbose=False)
        results.append([result[f"val/{metric}"] for metric in sorted(METRICS)])
    # float32 products of up to 384 terms in another order, through four layers
    tolerance = 4 * 384 * torch.finfo(torch.float32).eps
    assert results[1] == pytest.approx(results[0], rel=tolerance, abs=tolerance)
    assert results[2] == pytest.approx(results[0], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", ["supervised", "dpo", "kto"])
def test_rows_of_another_kind_are_refused_by_name_before_a_base_is_loaded(tmp_path, name):
    for kind in ROWS.keys() - {kind_of(name)}:
        tuned = module(name)
        told = rf"model.objective.name: .*the rows of data.train are .*{kind}.jsonl:1.*; give it such rows, or set"
        with pytest.raises(ConfigError, match=told):
            synthetic.trainer(tmp_path).fit(tuned, data(tmp_path, kind))
        assert tuned.model is None


def test_labels_of_1_and_0_are_those_of_classifiers_unless_the_format_is_named(tmp_path):
    rows = data(tmp_path, "labelled")
    path = tmp_path / "labelled.jsonl"
    path.write_text(path.read_text().replace(": true", ": 1").replace(": false", ": 0"))
    with pytest.raises(
        ConfigError, match=r"the rows of data.train are chats .*; data.format: kto reads labels of 1 and 0"
    ):
        check_data(Objective("kto"), rows)
    options = {"train": str(path), "tokenizer": str(TINY), "format": "kto"}
    check_data(Objective("kto"), ChatDataModule(**options))


def test_kto_needs_more_than_one_answer_in_a_micro_batch(tmp_path):
    with pytest.raises(ConfigError, match=r"data.batch_size: 1 cannot be used: kto's baseline .*data.packing: true"):
        synthetic.trainer(tmp_path).fit(module("kto"), data(tmp_path, "labelled", batch_size=1, packing=False))
    for name, options in (("dpo", {"batch_size": 1, "packing": False}), ("kto", {"batch_size": 1})):
        check_data(Objective(name), data(tmp_path, kind_of(name), **options))


@pytest.mark.filterwarnings("ignore:.*`max_epochs` was not set.*")
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_learning_rate_finder_leaves_adapter_and_reference_unchanged(tmp_path, name):
    tuned = synthetic.randomised(module(name))
    tuned.reference.set(trained_weights(tuned))
    fingerprint, before = tuned.reference.fingerprint, {n: t.clone() for n, t in tuned.state_dict().items()}
    trainer = synthetic.trainer(tmp_path, enable_checkpointing=True, callbacks=[RunCheckpoint(), Throughput(64)])
    options = {"min_lr": 1e-5, "max_lr": 1e-1, "num_training": 4, "early_stop_threshold": None}
    rows = data(tmp_path, kind_of(name), val_fraction=0.0, packing=False, batch_size=2)
    finder = Tuner(trainer).lr_find(tuned, datamodule=rows, **options)
    assert len(finder.results["loss"]) == 4
    assert all(torch.equal(tensor, before[n]) for n, tensor in tuned.state_dict().items())
    assert tuned.reference.fingerprint == fingerprint


def test_auto_batch_size_counts_both_answers_of_pairs(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(auto, "rows_that_fit", lambda spec, shape, room: (3, "none"))
    pairs = data(tmp_path, "pairs", max_tokens_per_batch="auto", batch_size=6)
    trainer = synthetic.trainer(tmp_path, max_steps=1, callbacks=[auto.AutoBatchSize()], limit_val_batches=0)
    with caplog.at_level("INFO"):
        trainer.fit(module("simpo"), pairs)
    assert "auto is 3 rows to a micro-batch, and 2 such micro-batches to an optimiser step of 6 rows" in caplog.text
    assert pairs.largest_train_batch()["shared_lengths"][0][0] == 0
    assert len(pairs.largest_train_batch()["document_lengths"]) <= 3
