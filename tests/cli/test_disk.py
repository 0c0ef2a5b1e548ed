"""Where nothing can be written, one line names the path, and the last checkpoint is unchanged."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.conftest import QUICK, TINY
from phi3_lightning.checkpoint.io import read_checkpoint

FIT = (*QUICK, "--trainer.max_steps=2", "--trainer.limit_val_batches=0")
BLOCK = 4096


@pytest.fixture
def disk(tmp_path) -> Path:
    """A disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, blocks_left: int) -> None:
    (disk / "filling").unlink(missing_ok=True)
    free = os.statvfs(disk)
    (disk / "filling").write_bytes(bytes(free.f_bavail * free.f_frsize - blocks_left * BLOCK))


def refusal(run) -> str:
    assert "Traceback" not in run.text
    (line,) = [line for line in run.text.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("blocks", [0, 4, 8, 30])
def test_a_full_disk_ends_a_fit_in_one_line(cli, disk, blocks):
    root = f"--trainer.default_root_dir={disk}"
    cli("fit", *FIT, root, "--trainer.max_steps=1")
    last = disk / "runs/phi3-lora/checkpoints/last.ckpt"
    fill(disk, blocks)
    line = refusal(cli("fit", *FIT, root, "--checkpoint.every_n_steps=1", code=1))
    assert str(disk / "runs/phi3-lora") in line
    assert "No space left on device" in line
    assert "free some space there" in line
    assert read_checkpoint(last)["global_step"] == 1


@pytest.mark.parametrize("command", ["validate", "test", "predict", "init", "preview", "export"])
def test_a_full_disk_ends_every_command_that_writes(cli, tmp_path, disk, command):
    if command not in ("init", "preview"):
        cli("fit", *FIT)
    fill(disk, 0)
    last = "--ckpt_path=runs/phi3-lora/checkpoints/last.ckpt"
    root = (f"--trainer.default_root_dir={disk}", "--trainer.logger=false", last)
    args = {
        "validate": (*QUICK, root[0], "--trainer.logger=true", last),  # TensorBoard writes in a thread
        "test": (*QUICK, *root, "--evaluation.rows=0"),
        "predict": (*QUICK, *root, f"--data.predict={TINY}/prompts.jsonl"),
        "init": (f"{disk}/configs",),
        "preview": (f"--data.tokenizer={TINY}", f"--data.train={TINY}/chats_val.jsonl", "--data.max_length=256",
                    f"--html={disk}/page.html"),
        "export": (last, f"--output_dir={disk}/out"),
    }  # fmt: skip
    line = refusal(cli(command, *args[command], code=1))
    assert str(disk) in line
    assert "No space left on device; free some space there" in line


def file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


RUN = "runs/phi3-lora"


@pytest.mark.parametrize(
    ("put", "place"),
    [
        (lambda folder: file(folder / "runs"), RUN),
        (lambda folder: file(folder / RUN), RUN),
        (lambda folder: file(folder / RUN / "checkpoints"), f"{RUN}/checkpoints"),
        (lambda folder: file(folder / RUN / "tensorboard"), f"{RUN}/tensorboard"),
        (lambda folder: (folder / RUN / "config.yaml").mkdir(parents=True), f"{RUN}/config.yaml"),
        (lambda folder: (folder / RUN / ".lock").mkdir(parents=True), f"{RUN}/.lock"),
    ],
    ids=["runs", "run", "checkpoints", "tensorboard", "config", "lock"],
)
def test_a_file_or_folder_in_the_way_is_named(cli, tmp_path, put: Callable[[Path], None], place):
    put(tmp_path)
    line = refusal(cli("fit", *FIT, code=1))
    assert line.startswith(f"error: {place}: ")
    assert line.endswith("move what is in the way, or name another place")


@pytest.mark.parametrize("root", ["/dev/null/x", "/proc/x"])
def test_a_root_that_cannot_be_created_is_named(cli, root):
    assert refusal(cli("fit", *FIT, f"--trainer.default_root_dir={root}", code=1)).startswith(f"error: {root}")


def test_a_failed_run_leaves_no_lock(cli, tmp_path):
    file(tmp_path / RUN / "tensorboard")
    cli("fit", *FIT, code=1)
    assert not (tmp_path / RUN / ".lock").exists()
