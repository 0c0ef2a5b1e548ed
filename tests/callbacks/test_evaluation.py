"""The report of ``test``: numbers against transformers' own, texts against the rows, and rows without a prompt."""

import json
from html.parser import HTMLParser
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM

import phi3_lightning
import synthetic
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.callbacks import EvaluationReport, PredictionWriter
from phi3_lightning.errors import ConfigError, DataError, ModelError

TINY = Path(phi3_lightning.__file__).parent / "assets" / "tiny_phi3"
EPSILON = torch.finfo(torch.float32).eps
EVIL = '<script>alert("x")</script> & ```\n<img src="http://example.com/x.png">'


def chat(*turns: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]}


ROWS = [chat(f"Who reads {i}?", "word " * (3 * i + 1)) for i in range(5)]
ROWS += [chat("Hello!", "Good day.", "Where are the maps?", "Upstairs, by the window."), chat("Say it", EVIL)]


@pytest.fixture
def write(tmp_path):
    def rows(*rows: dict, name: str = "test.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return rows


@pytest.fixture
def data(tmp_path, write):
    def made(*rows: dict, **options) -> ChatDataModule:
        options = {"batch_size": 3, "max_length": 256, "packing": False} | options
        return ChatDataModule(
            test=write(*(rows or ROWS)),
            tokenizer=str(TINY),
            num_workers=0,
            cache_dir=str(tmp_path / "cache"),
            **options,
        )

    return made


def module(**options) -> Phi3LoRAModule:
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    made = Phi3LoRAModule(str(TINY), dtype="float32", lora=lora, generation={"max_new_tokens": 8}, **options)
    return synthetic.randomised(made)


def run(folder: Path, data, tested=None, **options) -> tuple[dict, dict]:
    """The logged metrics, and the content of test.json."""
    report = EvaluationReport(folder / "run", **{"resamples": 100} | options)
    trainer = synthetic.trainer(folder, callbacks=[report])
    (logged,) = trainer.test(tested or module(), datamodule=data, verbose=False)
    return logged, json.loads((folder / "run/test.json").read_text(encoding="utf-8"))


def values(content: dict, model: str) -> dict[str, float]:
    return {name: found[model]["value"] for name, found in content["metrics"].items()}


def test_the_base_models_loss_is_transformers_own(tmp_path, data):
    logged, content = run(tmp_path, data(), rows=0)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    total, count = 0.0, 0
    single = data(batch_size=1)
    single.setup("test")
    for batch in single.test_dataloader():
        tokens = (batch["labels"][:, 1:] != -100).sum().item()
        with torch.no_grad():
            total += model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item() * tokens
        count += tokens
    # the same products in other shapes: a loss of about 7 moves by a few roundings of logits below 30
    assert values(content, "base")["loss"] == pytest.approx(total / count, rel=100 * EPSILON)
    assert values(content, "tuned")["loss"] == pytest.approx(logged["test/loss"], rel=EPSILON)
    assert values(content, "tuned")["perplexity"] == pytest.approx(logged["test/perplexity"], rel=10 * EPSILON)
    assert values(content, "tuned")["token_accuracy"] == pytest.approx(logged["test/token_accuracy"], rel=EPSILON)
    assert values(content, "base")["loss"] == pytest.approx(logged["test_base/loss"], rel=EPSILON)
    assert abs(logged["test/loss"] - logged["test_base/loss"]) > 0.01
    assert content["answers"] == []


def test_every_batch_size_and_packing_give_the_same_report(tmp_path, data):
    _, one = run(tmp_path, data(batch_size=1), batch_size=1)
    for options in ({"batch_size": 8}, {"packing": True}):
        _, other = run(tmp_path, data(**options), batch_size=8)
        assert other["answers"] == one["answers"]
        assert values(other, "tuned") == pytest.approx(values(one, "tuned"), rel=100 * EPSILON)
        assert values(other, "base") == pytest.approx(values(one, "base"), rel=100 * EPSILON)


def test_answers_are_those_of_predict_and_references_those_of_the_file(tmp_path, data, write):
    tested = module()
    logged, content = run(tmp_path, data(), tested)
    writer = PredictionWriter(tmp_path / "predictions.jsonl")
    trainer = synthetic.trainer(tmp_path, callbacks=[writer])
    trainer.predict(tested, datamodule=data(predict=write(*ROWS)), return_predictions=False)
    predicted = [json.loads(line) for line in writer.path.read_text().splitlines()]
    assert [found["tuned"]["answer"] for found in content["answers"]] == [found["answer"] for found in predicted]
    assert [found["tuned"]["finished"] for found in content["answers"]] == [found["finished"] for found in predicted]
    assert [found["base"]["answer"] for found in content["answers"]] != [found["answer"] for found in predicted]
    references = [row["messages"][-1]["content"].strip() for row in ROWS]
    assert [found["reference"].strip() for found in content["answers"]] == references
    assert [found["row"] for found in content["answers"]] == list(range(len(ROWS)))
    assert content["answers"][6]["place"].endswith("test.jsonl:7")
    # token losses are added up in another order
    tuned = values(content, "tuned")
    assert {name: logged[f"test/{name}"] for name in tuned} == pytest.approx(tuned, rel=100 * EPSILON)
    assert {"rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf", "exact_match", "stop_rate"} < set(
        content["metrics"]
    )


def test_the_number_of_rows_is_limited_and_they_are_the_same_each_time(tmp_path, data):
    _, three = run(tmp_path, data(), rows=3)
    _, again = run(tmp_path, data(batch_size=1), rows=3)
    _, everything = run(tmp_path, data(), rows=None)
    assert len(three["answers"]) == 3
    assert three["answers"] == again["answers"]
    assert three["metrics"]["rouge1"]["rows"] == 3
    assert three["metrics"]["loss"]["rows"] == len(everything["answers"]) == len(ROWS)


def test_rows_without_a_usable_prompt_are_counted_by_reason(tmp_path, data):
    rows = [*ROWS[:2], chat("Say nothing", ""), {"text": "A text without turns."}, chat("Go on", "word " * 60)]
    _, content = run(tmp_path, data(*rows, max_length=64, truncation="truncate_end"))
    reasons = {"empty reference": 1, "no prompt before the trained text": 1, "the reference was cut off": 1}
    assert content["left_out"] == reasons
    assert [found["row"] for found in content["answers"]] == [0, 1]
    assert content["metrics"]["loss"]["rows"] == 5
    markdown = (tmp_path / "run/test.md").read_text()
    assert all(f"1 ({reason})" in markdown for reason in reasons)


def test_without_usable_prompts_losses_are_still_reported(tmp_path, data):
    _, content = run(tmp_path, data(chat("Say nothing", "")))
    assert content["answers"] == []
    assert set(content["metrics"]) == {"loss", "perplexity", "token_accuracy"}


def test_an_interrupted_test_keeps_its_answers_and_the_previous_report(tmp_path, data, monkeypatch):
    tested = module()
    _, former = run(tmp_path, data(), tested)
    step, calls = tested.predict_step, []

    def stop(batch, batch_idx):
        calls.append(batch_idx)
        if len(calls) > 2:  # base and tuned model have answered the first batch
            raise ValueError("out of memory")
        return step(batch, batch_idx)

    monkeypatch.setattr(tested, "predict_step", stop)
    with pytest.raises(ValueError, match="out of memory"):
        run(tmp_path, data(), tested, batch_size=2)
    assert json.loads((tmp_path / "run/test.json").read_text()) == former
    partial = [json.loads(line) for line in (tmp_path / "run/test.partial.0.jsonl").read_text().splitlines()]
    assert [{"place": found["place"], **line} for found in former["answers"] for line in partial
            if line["row"] == found["row"]] == [found for found in former["answers"]
                                               if found["row"] in {line["row"] for line in partial}]  # fmt: skip
    assert len(partial) == 2
    monkeypatch.undo()
    run(tmp_path, data(), tested)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["test.html", "test.json", "test.md"]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_is_self_contained_and_runs_no_script(tmp_path, data):
    (tmp_path / "run/my-bot").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text(f"run: '{EVIL}'\n")
    (tmp_path / "run/my-bot/certificate.json").write_text(json.dumps({"compared": EVIL, "export": {"kl": 1e-7}}))
    with SummaryWriter(tmp_path / "run/tensorboard") as curves:
        for step, value in enumerate([3.0, 2.0, float("nan"), 1.0]):
            curves.add_scalar("train/loss", value, step)
            curves.add_scalar("speed/tokens_per_second", 100 + step, step)
            curves.add_scalar("epoch", step // 2, step)  # a count
            curves.add_scalar("speed/padding_fraction", 0.25, step)  # which never changes
            for layer in range(20):
                curves.add_scalar(f"adapter/layer_{layer}", layer, step)
        curves.add_scalar("test/loss", 1.0, 3)  # of an earlier test
    run(tmp_path, data())
    page = Page((tmp_path / "run/test.html").read_text(encoding="utf-8"))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "link", "iframe", "object", "a"}
    assert not any(name in ("src", "href") or name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count(EVIL) >= 3  # unchanged: in a reference, in the configuration, in the certificate
    assert ("meta", {"http-equiv": "Content-Security-Policy",
                     "content": "default-src 'none'; style-src 'unsafe-inline'"}) in page.tags  # fmt: skip
    for text in ("train/loss", "speed/tokens_per_second", "ROUGE-Lsum", "stop rate", "Certificate of my-bot",
                 "Configuration", "rows read", "Where are the maps?"):  # fmt: skip
        assert text in page.text
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 2
    assert "layer_" not in page.text  # curves of each layer are for TensorBoard
    assert "nan" not in "".join(str(attrs) for _, attrs in page.tags)


def test_every_report_names_score_signatures_and_warns_of_too_few_rows(tmp_path, data, capsys):
    _, content = run(tmp_path, data())
    forms = [(tmp_path / f"run/test.{suffix}").read_text(encoding="utf-8") for suffix in ("md", "html")]
    for text in (*forms, capsys.readouterr().out):
        assert "one character a word in scripts without spaces" in text
        assert "tok:13a" in text
        assert "too few rows to tell" in text
    assert "*" not in "".join(line for line in forms[0].splitlines() if line.startswith("|"))
    assert content["signatures"].keys() == {"rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf"}


def test_enough_rows_give_no_warning(tmp_path, data):
    rows = [chat(f"Who reads {i}?", "word " * (i % 5 + 1)) for i in range(20)]
    _, content = run(tmp_path, data(*rows), rows=0)
    markdown = (tmp_path / "run/test.md").read_text(encoding="utf-8")
    assert "too few rows" not in markdown
    assert content["metrics"]["loss"]["rows"] == 20
    assert content["signatures"] == {}


def test_markdown_escapes_any_text(tmp_path, data):
    run(tmp_path, data())
    markdown = (tmp_path / "run/test.md").read_text(encoding="utf-8")
    assert f"````text\n{EVIL}\n````" in markdown


def test_a_table_and_the_files_are_printed(tmp_path, data, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run(tmp_path, data())
    printed = capsys.readouterr().out
    assert "stop rate" in printed
    assert str(tmp_path / "run/test.html") in printed


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true"])
def test_every_precision_gives_the_loss_that_is_logged(tmp_path, data, precision):
    report = EvaluationReport(tmp_path / "run", rows=2, resamples=100)
    (logged,) = synthetic.trainer(tmp_path, callbacks=[report], precision=precision).test(
        module(), datamodule=data(), verbose=False
    )
    found = values(json.loads((tmp_path / "run/test.json").read_text()), "tuned")
    assert found["loss"] == pytest.approx(logged["test/loss"], rel=100 * EPSILON)  # the same sum in another order
    assert found["token_accuracy"] == pytest.approx(logged["test/token_accuracy"], rel=EPSILON)


class OwnChats(ChatDataModule):
    """A subclass, whose state in a checkpoint is under its own class name."""


def test_statistics_of_the_training_data_are_found_for_any_class_of_data(tmp_path, write):
    file = write(*ROWS)
    options = {"tokenizer": str(TINY), "max_length": 256, "num_workers": 0, "cache_dir": str(tmp_path / "cache")}
    chats, tested = OwnChats(train=file, val_fraction=0.0, **options), module()
    trainer = synthetic.trainer(tmp_path, max_steps=1, max_epochs=-1)
    trainer.fit(tested, datamodule=chats)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    report = EvaluationReport(tmp_path / "run", rows=0, resamples=100)
    trainer = synthetic.trainer(tmp_path, callbacks=[report])
    data = OwnChats(test=file, **options)
    trainer.test(tested, datamodule=data, ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    content = json.loads((tmp_path / "run/test.json").read_text(encoding="utf-8"))
    assert set(content["data"]["statistics"]) == {"train", "test"}
    assert content["step"] == 1
    trainer.test(tested, datamodule=data, verbose=False)  # the weights in memory, of no checkpoint
    content = json.loads((tmp_path / "run/test.json").read_text(encoding="utf-8"))
    assert set(content["data"]["statistics"]) == {"test"}
    assert content["step"] is None


def test_fast_dev_run_writes_nothing(tmp_path, data):
    trainer = synthetic.trainer(tmp_path, callbacks=[EvaluationReport(tmp_path / "run")], fast_dev_run=True)
    trainer.test(module(), datamodule=data(), verbose=False)
    assert not (tmp_path / "run/test.json").exists()


# ---------------------------------------------------------------- foreign projects


class Theirs(pl.LightningDataModule):
    """Provides batches that our module reads, and nothing else of ours."""

    def __init__(self, batches) -> None:
        super().__init__()
        self.batches = batches

    def test_dataloader(self):
        return synthetic.loader(self.batches)


@pytest.fixture
def batches(data):
    made = data()
    made.setup("test")
    return list(made.test_dataloader()), made.tokenizer


def test_a_foreign_datamodule_gives_the_same_answers(tmp_path, data, batches):
    theirs = Theirs(batches[0])
    theirs.tokenizer = batches[1]
    _, ours = run(tmp_path, data())
    _, content = run(tmp_path, theirs)
    assert content["data"]["source"] == "Theirs.test_dataloader"
    assert content["answers"][0]["place"] == "row 0"
    assert [found["tuned"] for found in content["answers"]] == [found["tuned"] for found in ours["answers"]]


def test_answers_without_a_tokenizer_are_refused_with_the_remedy(tmp_path, batches):
    with pytest.raises(ConfigError, match=r"attribute tokenizer.*evaluation\.rows: 0"):
        run(tmp_path, Theirs(batches[0]))
    _, content = run(tmp_path, Theirs(batches[0]), rows=0)
    assert content["metrics"]["loss"]["rows"] == len(ROWS)


def test_plain_loaders_have_losses_and_no_answers(tmp_path, batches):
    for rows in (0, 3):
        report = EvaluationReport(tmp_path / "run", rows=rows, resamples=100)
        trainer = synthetic.trainer(tmp_path, callbacks=[report])
        if rows:
            with pytest.raises(ConfigError, match="attribute tokenizer"):
                trainer.test(module(), synthetic.loader(batches[0]), verbose=False)
        else:
            trainer.test(module(), synthetic.loader(batches[0]), verbose=False)
            assert json.loads((tmp_path / "run/test.json").read_text())["data"]["source"] == "a dataloader"


def test_a_module_without_an_adapter_is_refused(tmp_path, batches):
    class Foreign(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def test_step(self, batch, batch_idx):
            return None

    with pytest.raises(ModelError, match="Foreign has no adapter"):
        run(tmp_path, Theirs(batches[0]), Foreign())


def test_data_without_a_trained_token_are_refused(tmp_path, batches):
    batches[0][0]["labels"][:] = -100
    with pytest.raises(DataError, match="no trained token"):
        run(tmp_path, Theirs(batches[0][:1]), rows=0)


@pytest.mark.parametrize("wrong", [{"rows": -1}, {"batch_size": 0}, {"resamples": 10}])
def test_ranges_are_checked(wrong):
    with pytest.raises(ConfigError, match=f"evaluation.{next(iter(wrong))}"):
        EvaluationReport(**wrong)


def test_pairs_are_ranked_by_both_models(tmp_path):
    pairs = [synthetic.pair(5 + seed, 2 + seed % 5, 1 + seed % 4, seed) for seed in range(9)]
    loader = synthetic.loader([synthetic.pairs_of([pairs[:2], pairs[2:5]]), synthetic.pairs_of([pairs[5:]], 5)])
    report = EvaluationReport(tmp_path / "run", rows=0, resamples=100)
    trainer = synthetic.trainer(tmp_path, callbacks=[report])
    tested = module(objective={"name": "dpo"})
    (logged,) = trainer.test(tested, loader, verbose=False)
    content = json.loads((tmp_path / "run/test.json").read_text(encoding="utf-8"))
    assert {found["rows"] for found in content["metrics"].values()} == {9}

    def means(model, side: int) -> list[tuple[float, int]]:
        outputs = [
            model(torch.tensor([ids]), labels=torch.tensor([labels])) for ids, labels in (p[side] for p in pairs)
        ]
        return [(output.loss.item(), p[side][1].count(-100)) for output, p in zip(outputs, pairs, strict=True)]

    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    for name, model in (("base", base), ("tuned", tested.model.eval())):
        with torch.no_grad():
            chosen, rejected = (means(model, side) for side in (0, 1))
        expected = sum(c < r for (c, _), (r, _) in zip(chosen, rejected, strict=True)) / 9
        assert values(content, name)["ranking_accuracy"] == pytest.approx(expected)
        tokens = [len(pair[0][0]) - prompt for pair, (_, prompt) in zip(pairs, chosen, strict=True)]
        loss = sum(c * count for (c, _), count in zip(chosen, tokens, strict=True)) / sum(tokens)
        assert values(content, name)["loss"] == pytest.approx(loss, rel=1e-5)  # of the chosen answers
    assert logged["test/ranking_accuracy"] == pytest.approx(values(content, "tuned")["ranking_accuracy"])
    interval = content["metrics"]["ranking_accuracy"]["difference"]
    assert interval["low"] <= interval["value"] <= interval["high"]


@pytest.mark.parametrize("good", [[True, False, True, False, True], [True] * 5])
def test_labelled_answers_are_compared_where_they_are_good_and_ranked_by_label(tmp_path, good):
    documents = [synthetic.document(9 + seed, 4, seed) for seed in range(5)]
    batches = [synthetic.labelled_of([documents[:2], documents[2:]], [good[:2], good[2:]])]
    filler = synthetic.batch_of([[]]) | {"preferred": [[]]}
    report = EvaluationReport(tmp_path / "run", rows=0, resamples=100)
    trainer = synthetic.trainer(tmp_path, callbacks=[report])
    tested = module(objective={"name": "kto"})
    (logged,) = trainer.test(tested, synthetic.loader([*batches, filler]), verbose=False)
    content = json.loads((tmp_path / "run/test.json").read_text(encoding="utf-8"))
    assert content["metrics"]["loss"]["rows"] == sum(good)
    if all(good):
        assert "ranking_accuracy" not in content["metrics"]
        return
    assert content["metrics"]["ranking_accuracy"]["rows"] == 5
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    for name, model in (("base", base), ("tuned", tested.model.eval())):
        with torch.no_grad():
            losses = [model(torch.tensor([ids]), labels=torch.tensor([labels])).loss for ids, labels in documents]
        ahead = [losses[i] < losses[j] for i in range(5) for j in range(5) if good[i] and not good[j]]
        assert values(content, name)["ranking_accuracy"] == pytest.approx(sum(ahead).item() / len(ahead))
    assert logged["test/ranking_accuracy"] == pytest.approx(values(content, "tuned")["ranking_accuracy"])
