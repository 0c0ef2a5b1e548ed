"""One fit at a time writes to a run's folder: the second names the first, and changes nothing."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.conftest import QUICK, Run, start
from phi3_lightning.checkpoint.io import read_checkpoint

FIT = (*QUICK, "--trainer.limit_val_batches=0", "--checkpoint.every_n_steps=2")
LAST = Path("runs/phi3-lora/checkpoints/last.ckpt")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in (folder / "runs").rglob("*") if path.suffix != ".tmp"}


@pytest.fixture
def first(tmp_path) -> Iterator[Run]:
    """A fit that runs as long as the test."""
    run = start(tmp_path, "fit", *FIT, "--trainer.max_steps=100000")
    yield run
    run.kill(signal.SIGKILL)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_second_fit_is_refused_until_the_first_ends(cli, tmp_path, first, devices):
    first.wait_for((tmp_path / LAST).exists)
    before = files(tmp_path)
    second = cli("fit", *FIT, f"--trainer.devices={devices}", "--run=phi3-lora", code=1)
    (line,) = [line for line in second.text.splitlines() if line.startswith("error: ")]
    assert f"run: runs/phi3-lora is in use: process {first.pid} on " in line
    assert "Traceback" not in second.text
    assert files(tmp_path) == before
    if devices == 1:  # validation is allowed
        assert "last.ckpt: taken" in cli("validate", *QUICK, "--trainer.limit_val_batches=1").text
    first.kill(signal.SIGKILL)
    first.wait()
    reached = read_checkpoint(tmp_path / LAST)["global_step"]
    after = cli("fit", *FIT, f"--trainer.max_steps={reached + 1}")
    assert f"resuming after step {reached}" in after.text
    assert not (tmp_path / "runs/phi3-lora/.lock").exists()


def test_a_refused_configuration_leaves_no_folder(cli, tmp_path):
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n')
    cli("fit", *FIT, "--data.train=chats.jsonl", "--trainer.max_steps=1", code=1)
    assert not (tmp_path / "runs").exists()
