"""The command ``test``: the report in the run's folder, and the answers that a killed test leaves."""

import json
import signal

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
