"""The command ``test``: the report in the run's folder, and the answers that a killed test leaves."""

import json
import signal

import pytest
import torch

from cli.conftest import QUICK, TINY, start

TESTED = ("--evaluation.rows=4", "--evaluation.resamples=100")


def test_a_report_of_the_run_is_in_its_folder(cli, tmp_path):
    cli("fit", *QUICK, "--trainer.max_steps=2", "--trainer.val_check_interval=1")
    run = cli("test", "--config=runs/phi3-lora/config.yaml", *TESTED)
    assert "stop rate" in run.text
    assert "the validation data, since data.test is not given" in run.text
    folder = tmp_path / "runs/phi3-lora"
    content = json.loads((folder / "test.json").read_text(encoding="utf-8"))
    assert content["checkpoint"].endswith("best.ckpt")
    assert content["step"] in (1, 2)
    assert len(content["answers"]) == 4
    assert content["metrics"]["loss"]["rows"] == 40
    assert set(content["data"]["statistics"]) == {"train", "val"}
    assert content["metrics"]["loss"]["tuned"] != content["metrics"]["loss"]["base"]
    page = (folder / "test.html").read_text(encoding="utf-8")
    assert "val/loss" in page  # a curve
    assert "max_length: 256" in page  # the configuration
    assert (folder / "test.md").is_file()


def test_without_a_checkpoint_base_and_tuned_numbers_are_equal(cli, tmp_path):
    run = cli("test", *QUICK, f"--data.test={TINY}/chats_val.jsonl", *TESTED)
    assert "no checkpoint, the base model answers" in run.text
    content = json.loads((tmp_path / "runs/phi3-lora/test.json").read_text(encoding="utf-8"))
    assert content["checkpoint"] is None
    assert all(found["difference"]["value"] == 0 for found in content["metrics"].values())


def test_a_killed_test_leaves_its_answers(tmp_path):
    options = ("--evaluation.rows=null", "--evaluation.batch_size=1", "--model.generation.max_new_tokens=64")
    run = start(tmp_path, "test", *QUICK, *options)
    partial = tmp_path / "runs/phi3-lora/test.partial.0.jsonl"
    run.wait_for(lambda: partial.is_file() and partial.read_text().count("\n") >= 2)
    run.kill(signal.SIGKILL)
    run.wait()
    lines = [json.loads(line) for line in partial.read_text(encoding="utf-8").splitlines()]
    assert all({"prompt", "reference", "base", "tuned"} < set(line) for line in lines)
    assert not (tmp_path / "runs/phi3-lora/test.json").exists()


def test_an_option_out_of_range_names_its_key(cli):
    assert "evaluation.rows: -1" in cli("test", *QUICK, "--evaluation.rows=-1", code=1).text


@pytest.mark.slow
def test_answers_of_validation_select_the_best_checkpoint_and_test_has_the_own_metric(cli, tmp_path):
    code = "def short(answer, reference, row):\n    return -len(answer) + len(row) * 0\n"
    (tmp_path / "own_scores_of_shop.py").write_text(code)
    options = ("--evaluation.val_rows=3", "--evaluation.metrics=[own_scores_of_shop:short]")
    decide = ("--checkpoint.monitor=val/short", "--checkpoint.mode=max")
    run = cli("fit", *QUICK, *options, *decide, "--trainer.max_steps=2", "--trainer.val_check_interval=1")
    assert run.text.count("3 validation rows answered in") == 2
    assert "val/rougeL" in run.text  # in the table at the end
    state = torch.load(tmp_path / "runs/phi3-lora/checkpoints/best.ckpt", weights_only=True)["callbacks"][
        "RunCheckpoint"
    ]
    assert (state["monitor"], state["mode"]) == ("val/short", "max")
    cli("test", "--config=runs/phi3-lora/config.yaml", *TESTED)  # of which the configuration has the metric
    content = json.loads((tmp_path / "runs/phi3-lora/test.json").read_text(encoding="utf-8"))
    assert content["metrics"]["short"]["tuned"]["value"] < 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--checkpoint.monitor=val/chrf",), "checkpoint.monitor: 'val/chrf' cannot be used: no row is answered"),
        (
            ("--checkpoint.monitor=val/chrf", "--evaluation.val_rows=2", "--evaluation.every_n_validations=2"),
            "evaluation.every_n_validations: 2 cannot be used: checkpoint.monitor val/chrf would keep its former value",
        ),
        (("--evaluation.metrics=absent:f",), "evaluation.metrics: absent:f: absent cannot be imported"),
    ],
)
def test_what_cannot_be_monitored_or_imported_is_refused_before_a_base_is_loaded(cli, options, error):
    text = cli("fit", *QUICK, *options, code=1).text
    assert error in text
    assert "Traceback" not in text
    assert "LoRA by" not in text
