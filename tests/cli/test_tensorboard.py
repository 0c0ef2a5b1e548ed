"""What a run shows in TensorBoard (in a browser too), in other loggers, and without one."""

import csv
import importlib.util
import re
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cli.conftest import QUICK, REPOSITORY

PANEL = ("--monitor.base_drift=true", "--monitor.samples=1", "--monitor.adapter_every_n_steps=2")
GROUPS = {"train", "val", "speed", "memory", "adapter", "adapter_layers", "base_drift", "result"}
CSV = '--trainer.logger={"class_path": "CSVLogger", "init_args": {"save_dir": "csv", "name": "", "version": ""}}'


def test_each_group_has_one_point_a_step_and_pages_have_content(cli, tmp_path):
    run = cli(
        "fit", *QUICK, *PANEL, "--trainer.max_steps=4", "--trainer.val_check_interval=4",
        "--trainer.accumulate_grad_batches=2", "--trainer.limit_val_batches=2",
    )  # fmt: skip
    folder = tmp_path / "runs/phi3-lora/tensorboard"
    assert len(list(folder.glob("events.*"))) == 1
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    assert {tag.partition("/")[0] for tag in tags["scalars"]} == GROUPS | {"epoch"}
    steps = {tag: [point.step for point in events.Scalars(tag)] for tag in tags["scalars"]}
    for tag in ("train/loss", "speed/padding_fraction", "speed/packing_efficiency", "speed/mfu", "memory/peak_gb"):
        assert steps[tag] == [0, 1, 2, 3]
    assert steps["adapter/relative_norm/q_proj"] == [0, 2]
    for tag in ("val/loss", "base_drift/kl", "base_drift/loss_change"):
        assert steps[tag] == [1, 3]
    assert {"config/text_summary", "samples/text_summary", "data/first_rows/text_summary"} <= set(tags["tensors"])
    assert run.text.count("answers:") == 2


@pytest.mark.parametrize("logger", [CSV, "--trainer.logger=false"])
def test_a_run_works_with_another_logger_or_none(cli, tmp_path, logger):
    cli("fit", *QUICK, *PANEL, logger, "--trainer.max_steps=3", "--trainer.val_check_interval=3")
    assert not (tmp_path / "runs/phi3-lora/tensorboard").exists()
    if logger == CSV:
        rows = csv.DictReader((tmp_path / "csv/metrics.csv").read_text().splitlines())
        assert {name.partition("/")[0] for name in rows.fieldnames} >= GROUPS - {"result"}


def test_drift_is_measured_on_the_users_chats(cli, tmp_path):
    rows = '{"instruction": "Say a", "output": "a"}\n{"instruction": "Say b", "output": "b"}\n'
    (tmp_path / "own.jsonl").write_text(rows)
    own = (*QUICK, "--monitor.base_drift=true", "--trainer.max_steps=1")
    assert "val: 2 rows read" in cli("fit", *own, "--monitor.general=own.jsonl").text
    (tmp_path / "special.jsonl").write_text('{"instruction": "Say <|end|>", "output": "a"}\n')
    run = cli("fit", *own, "--monitor.general=special.jsonl", "--data.special_text=refuse", "--run=third", code=1)
    assert "special.jsonl:1" in run.text
    run = cli("fit", *own, "--monitor.general=absent.jsonl", "--run=other", code=1)
    assert "error: monitor.general: " in run.text
    assert "absent.jsonl" in run.text
    assert not (tmp_path / "runs/other").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--monitor.samples=-1", "monitor.samples: -1"),
        ("--monitor.adapter_every_n_steps=0", "monitor.adapter_every_n_steps: 0"),
        ("--monitor.general=chats.jsonl", "monitor.base_drift is false"),
    ],
)
def test_values_out_of_range_are_refused(cli, option, message):
    assert message in cli("fit", *QUICK, option, code=1).text


@pytest.mark.slow
def test_tensorboard_shows_curves_and_pages_in_a_browser(cli, tmp_path):
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("no playwright: the extra dev is not installed")
    import screenshots as board

    if not board.CHROMIUM.exists():
        pytest.skip(f"no browser: {board.CHROMIUM} is missing")
    (tmp_path / "src").symlink_to(REPOSITORY / "src")  # the configuration's paths are those of a checkout
    cli("fit", f"--config={REPOSITORY}/configs/quickstart.yaml", "--trainer.max_steps=54")
    with board.tensorboard(tmp_path / "runs/quickstart/tensorboard") as address, board.browser() as page:
        page.goto(f"{address}/#timeseries")
        for group in sorted(GROUPS):
            page.locator(".group-name, .group-title", has_text=re.compile(rf"^\s*{group}\s*$")).first.wait_for()
        page.goto(f"{address}/#text")
        page.reload()
        for text in ("seed_everything: 42", "Keep your lantern lit", "Bold is trained"):
            page.get_by_text(text).first.wait_for(state="attached")
        page.goto(f"{address}/#hparams")
        page.reload()
        for column in ("lora/r", "optimizer/lr", "result/val_loss"):
            page.get_by_text(column).first.wait_for(state="attached")
