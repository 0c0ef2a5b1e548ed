"""Answers as metrics of validation: against the scoring libraries themselves, and without an effect on training."""

import json
from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from rich.progress import Progress
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.chrf import CHRF

import phi3_lightning
import synthetic
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.callbacks import EvaluationReport, LineProgress, PredictionWriter, RunCheckpoint, ValidationAnswers
from phi3_lightning.errors import ConfigError, ModelError

TINY = Path(phi3_lightning.__file__).parent / "assets" / "tiny_phi3"
NAMES = ("val/rougeL", "val/chrf", "val/exact_match", "val/stop_rate")
ROWS = [json.loads(line) for line in (TINY / "chats_val.jsonl").read_text().splitlines()[:9]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "nine.jsonl"
    path.write_text("".join(json.dumps(row | {"id": f"chat {i}"}) + "\n" for i, row in enumerate(ROWS)))
    return path


@pytest.fixture
def data(rows, cache):
    def chats(**options) -> ChatDataModule:
        small = {"max_length": 256, "packing": False, "batch_size": 4, "num_workers": 0, "cache_dir": cache}
        files = {"train": str(rows), "val": str(rows), "tokenizer": str(TINY)}
        return ChatDataModule(**files | small | options)

    return chats


def module(**options) -> Phi3LoRAModule:
    made = {"dtype": "float32", "lora": {"r": 4}, "optimizer": {"lr": 1e-2}, "generation": {"max_new_tokens": 6}}
    return Phi3LoRAModule(str(TINY), gradient_checkpointing="none", **made | options)


@pytest.fixture(scope="module")
def tuned() -> Phi3LoRAModule:
    """A module that no test changes."""
    return synthetic.randomised(module())


def validate(folder: Path, data, answers: ValidationAnswers, tuned) -> dict[str, float]:
    trainer = synthetic.trainer(folder, callbacks=[answers])
    [logged] = trainer.validate(tuned, data, verbose=False)
    return logged


def fit(folder: Path, data, *callbacks: pl.Callback, tuned=None, **options) -> pl.Trainer:
    options = {"max_epochs": 1, "num_sanity_val_steps": 0, "enable_checkpointing": bool(callbacks)} | options
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = synthetic.trainer(folder, callbacks=list(callbacks), **options | {"enable_checkpointing": checkpoints})
    trainer.fit(tuned or module(), data)
    return trainer


# ---------------------------------------------------------------------- what is measured


def test_scores_are_those_of_the_libraries_over_the_answers_of_predict(tmp_path, data, tuned):
    logged = validate(tmp_path, data(), ValidationAnswers(100), tuned)
    writer = PredictionWriter(tmp_path / "predictions.jsonl")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"messages": row["messages"][:-1]}) + "\n" for row in ROWS))
    trainer = synthetic.trainer(tmp_path, callbacks=[writer])
    trainer.predict(tuned, data(predict=str(prompts)), return_predictions=False)
    predicted = [json.loads(line) for line in writer.path.read_text().splitlines()]
    answers, references = [each["answer"] for each in predicted], [row["messages"][-1]["content"] for row in ROWS]
    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score(*pair)["rougeL"].fmeasure for pair in zip(references, answers, strict=True)]
    assert logged["val/rougeL"] == pytest.approx(sum(rouge) / len(ROWS), rel=1e-6)
    assert logged["val/chrf"] == pytest.approx(CHRF().corpus_score(answers, [references]).score, rel=1e-6)
    assert logged["val/exact_match"] == 0
    assert logged["val/stop_rate"] == pytest.approx(sum(each["finished"] for each in predicted) / len(ROWS))
    assert logged["val/answered_rows"] == len(ROWS)
    assert logged["speed/answering_seconds"] > 0


def test_the_rows_are_the_same_whatever_the_batches_and_at_each_validation(tmp_path, data, tuned):
    asked = []

    def spy(answer, reference, row):
        asked.append(row["id"])
        return 1.0

    results = []
    for options, answers in (
        ({}, ValidationAnswers(4, metrics=[spy])),
        ({"batch_size": 1}, ValidationAnswers(4, batch_size=1, metrics=[spy])),
        ({"packing": True}, ValidationAnswers(4, batch_size=3, metrics=[spy])),
    ):
        results.append(validate(tmp_path, data(**options), answers, tuned))
        assert results[-1]["val/answered_rows"] == 4
    assert sorted(asked[:4]) == sorted(asked[4:8]) == sorted(asked[8:])
    assert (
        [results[1][name] for name in NAMES]
        == [results[0][name] for name in NAMES]
        == [results[2][name] for name in NAMES]
    )
    asked.clear()
    fit(tmp_path, data(), ValidationAnswers(4, metrics=[spy]), max_epochs=2, limit_train_batches=1)
    assert sorted(asked[:4]) == sorted(asked[4:])
    assert len(asked) == 8


@pytest.mark.slow
def test_every_nth_validation_answers_also_after_a_restart(tmp_path, data):
    def answered(folder: str, **options) -> list[str]:
        logger = CSVLogger(tmp_path, name=folder, version="")
        answers = ValidationAnswers(2, every_n_validations=2)
        trainer = synthetic.trainer(
            tmp_path, callbacks=[answers], logger=logger, limit_train_batches=1, limit_val_batches=1, **options
        )
        path = tmp_path / "a.ckpt"
        trainer.fit(module(), data(), ckpt_path=path if path.exists() else None, weights_only=True)
        lines = (tmp_path / folder / "metrics.csv").read_text().splitlines()
        column = lines[0].split(",").index("val/rougeL"), lines[0].split(",").index("val/loss")
        values = [line.split(",") for line in lines[1:]]
        trainer.save_checkpoint(path)
        return [row[column[0]] != "" for row in values if row[column[1]]]

    assert answered("first", max_epochs=3) == [True, False, True]
    assert answered("second", max_epochs=5) == [False, True]


def test_the_sanity_check_answers_nothing(tmp_path, data):
    answers, calls = ValidationAnswers(2), []
    tuned = module()
    tuned.predict_step = lambda *args: calls.append(1)
    fit(tmp_path, data(), answers, tuned=tuned, num_sanity_val_steps=2, limit_val_batches=2, max_steps=0)
    assert calls == []


def test_the_chosen_answer_of_a_pair_is_the_reference(tmp_path, data):
    rows = [{"prompt": f"Is it {hour} o'clock?", "chosen": f"Yes, {hour}.", "rejected": "No."} for hour in range(6)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    references = []

    def spy(answer, reference, row):
        assert reference.strip() == row["chosen"]
        references.append(reference)
        return 0.0

    tuned = module(objective={"name": "dpo"})
    logged = validate(tmp_path, data(val=str(path), train=str(path)), ValidationAnswers(10, metrics=[spy]), tuned)
    assert len(set(references)) == logged["val/answered_rows"] == 6


def test_good_answers_alone_are_references_of_kto(tmp_path, data):
    rows = [
        {"prompt": f"Is it {hour} o'clock?", "completion": f"Yes, {hour}.", "label": hour % 2 == 0} for hour in range(6)
    ]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def good(answer, reference, row):
        return float(row["label"])

    tuned = module(objective={"name": "kto"})
    logged = validate(tmp_path, data(val=str(path), train=str(path)), ValidationAnswers(10, metrics=[good]), tuned)
    assert (logged["val/answered_rows"], logged["val/good"]) == (3, 1.0)


def test_without_a_usable_row_there_is_a_warning_and_no_metric(tmp_path, data, tuned):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "A text without turns."}) + "\n")
    with pytest.warns(UserWarning, match=r"no validation row can be answered \(no prompt before the trained text\)"):
        logged = validate(tmp_path, data(val=str(path)), ValidationAnswers(3), tuned)
    assert not logged.keys() & set(NAMES)


# ---------------------------------------------------------------------- training is as without


@pytest.mark.slow
def test_training_is_the_same_to_the_bit(tmp_path, data):
    generation = {"max_new_tokens": 4, "do_sample": True}

    def result(*callbacks) -> tuple[dict, torch.Tensor]:
        pl.seed_everything(3, verbose=False)
        tuned = module(lora={"r": 4, "lora_dropout": 0.3}, generation=generation)
        trainer = fit(tmp_path, data(), *callbacks, tuned=tuned, val_check_interval=1, limit_val_batches=1)
        assert trainer.global_step == 3
        assert tuned.loaded_model.training
        return dict(tuned.state_dict()), torch.rand(3)

    (without, drawn), (answered, drawn_after_answers) = result(), result(ValidationAnswers(3))
    assert all(torch.equal(answered[name], tensor) for name, tensor in without.items())
    assert torch.equal(drawn, drawn_after_answers)


def test_sampled_answers_are_the_same_at_each_validation(tmp_path, data):
    tuned = synthetic.randomised(module(generation={"max_new_tokens": 6, "do_sample": True}))
    first, second = (validate(tmp_path, data(), ValidationAnswers(3), tuned) for _ in range(2))
    assert [first[name] for name in NAMES] == [second[name] for name in NAMES]


@pytest.mark.parametrize("averaging_first", [True, False])
def test_averaged_weights_answer_wherever_the_callback_stands(tmp_path, data, averaging_first):
    seen = []

    class Spying(Phi3LoRAModule):
        def predict_step(self, batch, batch_idx):
            seen.append([parameter.detach().clone() for parameter in self.trained_parameters()])
            return super().predict_step(batch, batch_idx)

    averaging = EMAWeightAveraging(decay=0.5)
    callbacks = [averaging, ValidationAnswers(2)]
    tuned = Spying(str(TINY), dtype="float32", optimizer={"lr": 1e-2}, generation={"max_new_tokens": 2})
    expected = []

    class Record(pl.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *args):
            expected[:] = [parameter.detach().clone() for parameter in pl_module.trained_parameters()]

    callbacks = [*(callbacks if averaging_first else callbacks[::-1]), Record()]
    with pytest.warns(UserWarning, match="overrides the configure_model"):
        trainer = fit(tmp_path, data(), *callbacks, tuned=tuned, limit_train_batches=2)
    assert trainer.global_step == 2
    [answering] = seen
    assert all(torch.equal(one, other) for one, other in zip(answering, expected, strict=True))


# ---------------------------------------------------------------------- what decides


@pytest.mark.slow
def test_a_score_of_answers_selects_checkpoints_and_stops(tmp_path, data):
    values = iter([30.0, 50.0, 40.0, 45.0])

    def scripted(answer, reference, row):
        return next(values)

    checkpoint = RunCheckpoint(str(tmp_path / "kept"), "val/scripted", "max")
    stop = EarlyStopping("val/scripted", mode="max", patience=2)
    trainer = fit(
        tmp_path,
        data(),
        ValidationAnswers(1, metrics=[scripted]),
        checkpoint,
        stop,
        max_epochs=9,
        limit_train_batches=1,
    )
    assert checkpoint.best_score == stop.best_score == 50
    assert torch.load(checkpoint.best_path, weights_only=True)["global_step"] == 2
    assert trainer.current_epoch == 4  # the second after the best


def refuse(answers: ValidationAnswers, *callbacks, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        answers.check_monitors(callbacks)


def own(answer, reference, row):
    return 1.0


def test_monitors_that_would_mislead_are_refused(tmp_path, data):
    chrf = RunCheckpoint(monitor="val/chrf")
    refuse(ValidationAnswers(4, 3), chrf, match=r"every_n_validations: 3 .*checkpoint.monitor val/chrf would keep")
    refuse(ValidationAnswers(4, 3), EarlyStopping("val/chrf", mode="max"), match="EarlyStopping.monitor val/chrf would")
    refuse(ValidationAnswers(4, 2, metrics=[own]), ModelCheckpoint(monitor="val/own"), match="every_n_validations: 2")
    refuse(ValidationAnswers(0), chrf, match="checkpoint.monitor: 'val/chrf' .*set evaluation.val_rows")
    refuse(ValidationAnswers(4), EarlyStopping("val/rougeL"), match="EarlyStopping.mode: 'min' .*give mode: max")
    refuse(ValidationAnswers(4), ModelCheckpoint(monitor="val/rougeL"), match=r"ModelCheckpoint.mode: 'min'")
    refuse(ValidationAnswers(4, metrics=[own]), RunCheckpoint(monitor="val/own"), match=r"checkpoint.mode: None")
    with pytest.raises(ConfigError, match="every_n_validations: 3"):
        fit(tmp_path, data(), ValidationAnswers(4, 3), chrf)


def test_monitors_that_are_right_are_accepted():
    ValidationAnswers(4).check_monitors([RunCheckpoint(monitor="val/chrf"), EarlyStopping("val/chrf", mode="max")])
    answers = ValidationAnswers(4, metrics=[own])
    answers.check_monitors([RunCheckpoint(monitor="val/own", mode="min"), EarlyStopping("val/own")])
    ValidationAnswers(4, 3).check_monitors([RunCheckpoint(), EarlyStopping("val/loss"), ModelCheckpoint()])


def plateau(monitor: str) -> type[Phi3LoRAModule]:
    class Plateau(Phi3LoRAModule):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.trained_parameters(), lr=1e-2)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}

    return Plateau


@pytest.mark.parametrize(
    ("answers", "monitor", "message"),
    [
        (ValidationAnswers(2, 2), "val/chrf", r"every_n_validations: 2 .*val/chrf of ReduceLROnPlateau would keep"),
        (ValidationAnswers(0), "val/chrf", r"evaluation.val_rows: 0 .*val/chrf of ReduceLROnPlateau needs rows"),
        (ValidationAnswers(1), "val/chrf", None),
        (ValidationAnswers(1, 2), "val/loss", None),
    ],
)
def test_a_schedule_that_would_follow_a_stale_score_is_refused(tmp_path, data, answers, monitor, message):
    tuned = plateau(monitor)(str(TINY), dtype="float32", generation={"max_new_tokens": 1})
    refusal = nullcontext() if message is None else pytest.raises(ConfigError, match=message)
    with refusal:
        fit(tmp_path, data(), answers, tuned=tuned, limit_train_batches=1, limit_val_batches=1)


@pytest.mark.parametrize("bar", [LineProgress, TQDMProgressBar, RichProgressBar])
def test_answering_shows_its_progress(tmp_path, data, tuned, monkeypatch, bar):
    lines, advanced = [], []
    monkeypatch.setattr("phi3_lightning.progress.LINE_INTERVAL_SECONDS", -1)  # a line for each batch but the last
    monkeypatch.setattr("phi3_lightning.progress.rank_zero_info", lines.append)
    monkeypatch.setattr(Progress, "advance", lambda self, task: advanced.append(self.tasks[-1].description))
    answers = ValidationAnswers(3, batch_size=2)
    shown = synthetic.trainer(tmp_path, callbacks=[answers, bar()], enable_progress_bar=True)
    shown.validate(tuned, data(), verbose=False)
    if bar is RichProgressBar:
        assert advanced.count("Answering") == 2
    else:
        assert [line for line in lines if line.startswith("answering")] == [
            "answering: 1 of 2 batches of validation rows"
        ]


def test_rows_without_validation_data_are_refused(tmp_path, data):
    with pytest.raises(ConfigError, match=r"evaluation.val_rows: 2 .*give data.val or data.val_fraction"):
        fit(tmp_path, data(val=None, val_fraction=0.0), ValidationAnswers(2))
    fit(tmp_path, data(val=None, val_fraction=0.0), ValidationAnswers(0), max_steps=1, max_epochs=-1)


@pytest.mark.parametrize("wrong", [{"val_rows": -1}, {"every_n_validations": 0}, {"batch_size": 0}])
def test_ranges_are_checked(wrong):
    with pytest.raises(ConfigError, match=f"evaluation.{next(iter(wrong))}"):
        ValidationAnswers(**wrong)


# ---------------------------------------------------------------------- the user's own metrics


def test_an_own_metric_has_the_row_in_validation_and_in_test(tmp_path, data, tuned, monkeypatch):
    (tmp_path / "shop.py").write_text(
        "def same_id(answer, reference, row):\n"
        "    assert reference.strip() == row['messages'][-1]['content']\n"
        "    return row['id'] == 'chat 3' or row['id'] == 'chat 4'\n"
    )
    monkeypatch.chdir(tmp_path)
    logged = validate(tmp_path, data(), ValidationAnswers(100, metrics="shop:same_id"), tuned)
    assert logged["val/same_id"] == pytest.approx(2 / 9)
    report = EvaluationReport(tmp_path / "run", rows=None, resamples=100, metrics=["shop:same_id"])
    [logged] = synthetic.trainer(tmp_path, callbacks=[report]).test(tuned, data(), verbose=False)
    assert logged["test/same_id"] == logged["test_base/same_id"] == pytest.approx(2 / 9)
    content = json.loads((tmp_path / "run/test.json").read_text())
    interval = content["metrics"]["same_id"]["tuned"]
    assert interval["low"] < interval["value"] < interval["high"]
    assert [row["tuned"]["same_id"] for row in content["answers"]] == [0, 0, 0, 1, 1, 0, 0, 0, 0]
    assert content["signatures"]["same_id"] == "the mean of shop:same_id"
    for suffix in ("md", "html"):
        assert "same_id" in (tmp_path / f"run/test.{suffix}").read_text()


def test_an_error_of_an_own_metric_names_the_row_and_the_line(tmp_path, data, rows, tuned):
    def price(answer, reference, row):
        return row["price"]

    named = rf"evaluation.metrics: .*:price: KeyError: 'price' \(.*{Path(__file__).name}:\d+\); the row is {rows}:\d"
    with pytest.raises(ConfigError, match=named):
        validate(tmp_path, data(), ValidationAnswers(2, metrics=[price]), tuned)
    report = EvaluationReport(tmp_path / "run", resamples=100, metrics=[price])
    with pytest.raises(ConfigError, match=named):
        synthetic.trainer(tmp_path, callbacks=[report]).test(tuned, data(), verbose=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "much"])
def test_a_value_that_is_no_number_is_refused(tmp_path, data, tuned, value):
    def wrong(answer, reference, row):
        return value

    with pytest.raises(ConfigError, match=r"evaluation.metrics: .*wrong: .*; the row is .*:\d"):
        validate(tmp_path, data(), ValidationAnswers(2, metrics=[wrong]), tuned)


SOURCE = """
LIMIT = 3
def one(answer): return 1
def chrf(answer, reference, row): return 1
def reward_margin(answer, reference, row): return 1
value = lambda a, b, c: 1
"""


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("keywords", "write it as module:function"),
        ("own_metrics_file.py", "write it as module:function"),
        (
            "absent_module:f",
            r"absent_module cannot be imported: ModuleNotFoundError: No module named 'absent_module'; write it",
        ),
        ("broken_file:f", r"broken_file cannot be imported: ZeroDivisionError: .*broken_file.py:1"),
        ("own_file:absent", "own_file has no function absent; its functions: one, chrf, reward_margin, value"),
        ("own_file:LIMIT", "own_file has no function LIMIT"),
        ("own_file:one", r"cannot be called with \(answer, reference, row\)"),
        ("own_file:chrf", "there is a metric chrf already"),
        ("own_file:reward_margin", "there is a metric reward_margin already"),
        ("own_file:value", "it has no name for the curve"),
    ],
)
def test_a_path_that_leads_to_no_metric_is_refused_at_once(tmp_path, monkeypatch, path, why):
    (tmp_path / "own_file.py").write_text(SOURCE)
    (tmp_path / "broken_file.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    for answers in (ValidationAnswers, EvaluationReport):
        with pytest.raises(ConfigError, match=rf"^evaluation.metrics: .*{why}"):
            answers(metrics=path)


def test_two_metrics_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two functions are called own"):
        ValidationAnswers(metrics=[own, own])


# ---------------------------------------------------------------------- foreign projects


class Theirs(pl.LightningDataModule):
    """Provides batches that our module reads, and nothing else of ours."""

    def __init__(self, batches) -> None:
        super().__init__()
        self.batches = batches

    def val_dataloader(self):
        return synthetic.loader(self.batches)


def test_a_foreign_data_module_with_a_tokenizer_gives_the_same_scores(tmp_path, data, tuned):
    chats = data()
    chats.setup("validate")
    theirs = Theirs(list(chats.val_dataloader()))
    with pytest.raises(ConfigError, match=r"evaluation.val_rows: .*attribute tokenizer"):
        validate(tmp_path, theirs, ValidationAnswers(3), tuned)
    theirs.tokenizer = chats.tokenizer

    def place(answer, reference, row):
        return float(row["place"].removeprefix("row "))

    logged = validate(tmp_path, theirs, ValidationAnswers(3, metrics=[place]), tuned)
    ours = validate(tmp_path, data(), ValidationAnswers(3), tuned)
    assert [logged[name] for name in NAMES] == [ours[name] for name in NAMES]
    assert logged["val/place"] > 0


def test_a_foreign_module_is_refused(tmp_path, data):
    class Foreign(pl.LightningModule):
        def validation_step(self, batch, batch_idx):
            return None

    with pytest.raises(ModelError, match="ValidationAnswers: Foreign cannot answer prompts; give a Phi3LoRAModule"):
        validate(tmp_path, data(), ValidationAnswers(1), Foreign())
