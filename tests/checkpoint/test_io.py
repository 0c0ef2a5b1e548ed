"""A checkpoint file is complete or absent, and reading one runs no code."""

import errno
import os
import pickle
import resource
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.checkpoint.io import SafeCheckpointIO, read_checkpoint
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


def test_a_checkpoint_reads_back_and_no_temporary_file_stays(path):
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


def test_a_failed_first_checkpoint_reports_that_none_exists(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="there was none before"):
        SafeCheckpointIO().save_checkpoint(NEWER, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_content_is_flushed_before_the_rename(path, monkeypatch):
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


def test_an_adapter_file_is_refused_with_init_from_as_the_remedy(tmp_path, path):
    with pytest.raises(CheckpointError, match=r"a folder, and no checkpoint.*model\.lora\.init_from"):
        read_checkpoint(tmp_path)
    torch.save({"layer.lora_A": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match=r"not a Lightning checkpoint.*model\.lora\.init_from"):
        read_checkpoint(path)


def test_a_file_of_something_else_is_a_named_error(path):
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="not a Lightning checkpoint"):
        read_checkpoint(path)


class Touch:
    """Creates a file when it is unpickled."""

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
    assert trace.exists()  # the pickle does run code elsewhere


def test_a_bare_pickle_is_never_run(path, tmp_path):
    trace = tmp_path / "trace"
    path.write_bytes(pickle.dumps({"state_dict": {}, "callback": Touch(trace)}))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not trace.exists()


def test_a_trainer_saves_and_resumes_with_the_plugin(tmp_path, tiny_base):
    data = synthetic.loader([synthetic.batch_of([[synthetic.document(9, 5, 0)]])])
    module = Phi3LoRAModule(tiny_base, dtype="float32")
    first = synthetic.trainer(tmp_path, plugins=[SafeCheckpointIO()])
    first.fit(module, data)
    first.save_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt.tmp").exists()
    again = synthetic.trainer(tmp_path, plugins=[SafeCheckpointIO()], max_epochs=2)
    again.fit(Phi3LoRAModule(tiny_base, dtype="float32"), data, ckpt_path=tmp_path / "a.ckpt")
    assert again.global_step == 2


# ---------------------------------------------------------------- full disks and kills


def test_a_disk_with_a_limit_leaves_the_former_file(path):
    """A file-size limit makes the write of a large checkpoint fail at some byte, as a full disk does."""
    big = {"state_dict": {"w": torch.ones(500_000)}, "global_step": 5}
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, former[1]))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(CheckpointError, match=r"last\.ckpt: .*could not be written.*the former one is untouched"):
            SafeCheckpointIO().save_checkpoint(big, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert_holds(path, FORMER)


@pytest.mark.parametrize("written", [0, 1, 1000, 100_000, None])
def test_a_kill_at_any_byte_leaves_the_former_file(path, written):
    """The child dies after ``written`` bytes; None: after all are written, before the rename."""
    pid = os.fork()
    if pid == 0:
        real = Path.open

        class Dying:
            def __init__(self, file) -> None:
                self.file, self.left = file, written

            def write(self, data):
                if self.left is not None and self.left < len(data):
                    self.file.write(bytes(data)[: self.left])
                    self.file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                self.left = None if self.left is None else self.left - len(data)
                return self.file.write(data)

            def __getattr__(self, name):
                return getattr(self.file, name)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

        Path.open = lambda self, *a, **k: Dying(real(self, *a, **k))
        Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        try:
            SafeCheckpointIO().save_checkpoint(NEWER, path)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert torch.equal(read_checkpoint(path)["state_dict"]["w"], FORMER["state_dict"]["w"])
    SafeCheckpointIO().save_checkpoint(NEWER, path)  # the leftover temporary file does not interfere
    assert_holds(path, NEWER)


# ---------------------------------------------------------------- Lightning's own callback


class Losses(pl.Callback):
    """Records the loss of every validation."""

    def __init__(self) -> None:
        self.scores: list[float] = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.scores.append(trainer.callback_metrics["val/loss"].item())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")  # which is intended
def test_lightnings_model_checkpoint_keeps_the_best_by_token_weighted_loss(tmp_path, tiny_base):
    data = synthetic.loader([synthetic.batch_of([[synthetic.document(9, 5, seed)]]) for seed in range(3)])
    losses = Losses()
    keep = ModelCheckpoint(
        tmp_path / "kept", filename="{step}", monitor="val/loss", save_top_k=2, save_last=True,
        auto_insert_metric_name=False,
    )  # fmt: skip
    module = Phi3LoRAModule(tiny_base, dtype="float32", optimizer={"lr": 3e-2}, schedule={"name": "constant"})
    options = {"plugins": [SafeCheckpointIO()], "enable_checkpointing": True}
    trainer = synthetic.trainer(tmp_path, max_epochs=4, callbacks=[losses, keep], **options)
    trainer.fit(module, data, data)
    kept = sorted((tmp_path / "kept").iterdir())
    best = sorted(range(4), key=losses.scores.__getitem__)[:2]
    assert {path.name for path in kept} == {"last.ckpt", *(f"{3 * (epoch + 1)}.ckpt" for epoch in best)}
    assert Path(keep.best_model_path).name == f"{3 * (best[0] + 1)}.ckpt"
    assert not any(path.is_symlink() for path in kept)
    newest = 3 * (max(best) + 1)  # Lightning rewrites `last` whenever it saves one of the best
    assert read_checkpoint(tmp_path / "kept" / "last.ckpt")["global_step"] == newest
    again = synthetic.trainer(tmp_path, max_epochs=5, callbacks=[keep], **options)
    again.fit(
        Phi3LoRAModule(tiny_base, dtype="float32", optimizer={"lr": 3e-2}, schedule={"name": "constant"}),
        data, data, ckpt_path=tmp_path / "kept" / "last.ckpt",
    )  # fmt: skip
    assert again.global_step == 15


def test_storage_options_are_refused_as_lightning_does(tmp_path):
    with pytest.raises(TypeError, match="storage_options"):
        SafeCheckpointIO().save_checkpoint(FORMER, tmp_path / "a.ckpt", storage_options={})


def test_a_plain_state_reads_back_unless_it_was_saved_elsewhere(tmp_path):
    state = {"adapter.lora_A": torch.arange(3.0)}
    SafeCheckpointIO().save_checkpoint(state, tmp_path / "sent.ckpt")
    found = SafeCheckpointIO().load_checkpoint(tmp_path / "sent.ckpt")
    assert found.keys() == state.keys()
    assert torch.equal(found["adapter.lora_A"], state["adapter.lora_A"])
    torch.save(state, tmp_path / "adapter.pt")  # an adapter is not a checkpoint
    with pytest.raises(CheckpointError, match="not a Lightning checkpoint"):
        SafeCheckpointIO().load_checkpoint(tmp_path / "adapter.pt")
