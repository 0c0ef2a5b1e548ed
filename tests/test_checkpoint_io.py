"""A checkpoint file is whole or not there, and reading one runs nothing."""

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.checkpoint_io import SafeCheckpointIO, read_checkpoint
from phi3_lightning.errors import CheckpointError

FORMER = {"state_dict": {"w": torch.arange(4.0)}, "global_step": 3}
NEWER = {"state_dict": {"w": torch.ones(50_000)}, "global_step": 4}


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "last.ckpt"
    SafeCheckpointIO().save_checkpoint(FORMER, path)
    return path


def assert_holds(path: Path, checkpoint: dict) -> None:
    read = SafeCheckpointIO().load_checkpoint(path)
    assert read["global_step"] == checkpoint["global_step"]
    assert torch.equal(read["state_dict"]["w"], checkpoint["state_dict"]["w"])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_is_written_is_read_and_nothing_else_is_left(path):
    SafeCheckpointIO().save_checkpoint(NEWER, path)
    assert_holds(path, NEWER)


def test_folders_are_made(tmp_path):
    path = tmp_path / "runs" / "a" / "last.ckpt"
    SafeCheckpointIO().save_checkpoint(FORMER, path)
    assert_holds(path, FORMER)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_leaves_the_former_file(path):
    path.with_name("last.ckpt.tmp").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"last\.ckpt: .*could not be written.*the former one is untouched"):
        SafeCheckpointIO().save_checkpoint(NEWER, path)
    assert_holds(path, FORMER)


def test_a_disk_that_fills_up_while_flushing_leaves_the_former_file(path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*the former one is untouched"):
        SafeCheckpointIO().save_checkpoint(NEWER, path)
    monkeypatch.undo()
    assert_holds(path, FORMER)


def test_the_first_checkpoint_that_fails_says_that_there_is_none(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="there was none before"):
        SafeCheckpointIO().save_checkpoint(NEWER, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_the_content_reaches_the_disk_before_the_name_does(path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("flush"), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (events.append("rename"), replace(self, target))[1])
    SafeCheckpointIO().save_checkpoint(NEWER, path)
    assert events == ["flush", "rename", "flush"]


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_a_named_error(path, kept):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=r"last\.ckpt: not a whole checkpoint"):
        read_checkpoint(path)


def test_a_missing_file_is_a_named_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.ckpt: there is no such checkpoint"):
        read_checkpoint(tmp_path / "none.ckpt")


def test_a_file_of_something_else_is_a_named_error(path):
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="not a Lightning checkpoint"):
        read_checkpoint(path)


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("weights_only", [True, False, None])
def test_code_in_a_file_is_never_run(path, tmp_path, weights_only):
    trace = tmp_path / "trace"
    torch.save({"state_dict": {}, "callback": Touch(trace)}, path)
    with pytest.raises(CheckpointError, match="tensors and plain types"):
        SafeCheckpointIO().load_checkpoint(path, weights_only=weights_only)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the file was dangerous


def test_a_bare_pickle_is_never_run(path, tmp_path):
    trace = tmp_path / "trace"
    path.write_bytes(pickle.dumps({"state_dict": {}, "callback": Touch(trace)}))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not trace.exists()


def test_a_trainer_saves_and_resumes_through_it(tmp_path, tiny_base):
    data = synthetic.loader([synthetic.batch_of([[synthetic.document(9, 5, 0)]])])
    module = Phi3LoRAModule(tiny_base, dtype="float32")
    first = synthetic.trainer(tmp_path, plugins=[SafeCheckpointIO()])
    first.fit(module, data)
    first.save_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt.tmp").exists()
    again = synthetic.trainer(tmp_path, plugins=[SafeCheckpointIO()], max_epochs=2)
    again.fit(Phi3LoRAModule(tiny_base, dtype="float32"), data, ckpt_path=tmp_path / "a.ckpt")
    assert again.global_step == 2


def test_storage_options_are_refused_as_lightning_does(tmp_path):
    with pytest.raises(TypeError, match="storage_options"):
        SafeCheckpointIO().save_checkpoint(FORMER, tmp_path / "a.ckpt", storage_options={})
