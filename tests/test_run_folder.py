"""Each run has one folder: the same command resumes, and nothing is lost silently."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.checkpoint.io import read_checkpoint
from phi3_lightning.errors import CheckpointError, ConfigError
from phi3_lightning.run_folder import RunFolder, nothing_left


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder.named("bot", tmp_path)


def write_checkpoint(folder: RunFolder, name: str, step: int = 3) -> Path:
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, "global_step": step}, folder.checkpoints / name)
    return folder.checkpoints / name


def test_a_run_has_one_folder(folder, tmp_path):
    assert folder.path == tmp_path / "runs" / "bot"
    assert RunFolder.named("bot", None).path == Path("runs/bot")


@pytest.mark.parametrize("name", ["", "a/b", "../a", "..", "/a", "a/", "."])
def test_a_name_that_leads_elsewhere_is_refused(name):
    with pytest.raises(ConfigError, match=r"^run: "):
        RunFolder.named(name, None)


def test_a_new_run_has_no_checkpoint(folder):
    assert folder.newest("auto") is None
    assert folder.newest("never") is None
    assert folder.checkpoint(None) is None


def test_a_run_resumes_from_its_last_checkpoint(folder):
    write_checkpoint(folder, "best.ckpt", 2)
    last = write_checkpoint(folder, "last.ckpt", 3)
    path, content = folder.newest("auto")
    assert (path, content["global_step"]) == (last, 3)


def test_evaluation_takes_the_best_and_else_the_last(folder):
    last = write_checkpoint(folder, "last.ckpt")
    assert folder.checkpoint(None) == last
    best = write_checkpoint(folder, "best.ckpt")
    assert folder.checkpoint(None) == best


def test_resume_never_refuses_a_folder_that_is_not_empty(folder):
    folder.path.mkdir(parents=True)
    assert folder.newest("never") is None
    (folder.path / "config.yaml").touch()
    with pytest.raises(CheckpointError, match=r"--resume never: .*bot is not empty"):
        folder.newest("never")


def test_an_unreadable_last_checkpoint_is_an_error_not_a_fresh_start(folder):
    write_checkpoint(folder, "last.ckpt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"last\.ckpt: not a whole checkpoint"):
        folder.newest("auto")


def test_a_lost_last_checkpoint_is_an_error_not_a_fresh_start(folder):
    write_checkpoint(folder, "best.ckpt")
    with pytest.raises(CheckpointError, match=r"best\.ckpt and no last\.ckpt.*--ckpt_path .*best\.ckpt"):
        folder.newest("auto")


def test_former_configurations_are_kept(folder):
    for text in ("a: 1", "a: 1", "a: 2", "a: 3"):
        folder.keep_config(text)
    kept = {path.name: path.read_text() for path in folder.path.iterdir()}
    assert kept == {"config.yaml": "a: 3", "config.1.yaml": "a: 1", "config.2.yaml": "a: 2"}


def train(folder: Path, base: str, max_epochs: int, **options) -> tuple[int, dict]:
    """Epochs and last checkpoint of a run with three steps per epoch whose validation never improves."""
    batches = [synthetic.batch_of([[synthetic.document(9, 5, seed)]]) for seed in range(3)]
    module = Phi3LoRAModule(base, dtype="float32", optimizer={"lr": 1e-9})
    stopping = EarlyStopping("val/loss", **{"min_delta": 1.0} | options)
    trainer = synthetic.trainer(folder, max_epochs=max_epochs, callbacks=[stopping], num_sanity_val_steps=0)
    trainer.fit(module, synthetic.loader(batches), synthetic.loader(batches))
    trainer.save_checkpoint(folder / "last.ckpt")
    return trainer.current_epoch, read_checkpoint(folder / "last.ckpt")


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory, tiny_base) -> dict:
    """The checkpoint after two epochs of three steps each."""
    return train(tmp_path_factory.mktemp("run"), tiny_base, 2, patience=2)[1]


@pytest.mark.parametrize(
    ("max_epochs", "max_steps", "reason"),
    [
        (2, -1, "max_epochs 2"),
        (1, -1, "max_epochs 1"),
        (None, 6, "max_steps 6"),
        (9, 5, "max_steps 5"),
        (3, -1, None),
        (-1, -1, None),
        (None, 7, None),
        (None, -1, None),
        (3, 7, None),
    ],
)
def test_a_run_is_finished_where_lightning_would_stop(two_epochs, max_epochs, max_steps, reason):
    reason_to_stop = nothing_left(two_epochs, max_epochs, max_steps)
    assert reason_to_stop is None if reason is None else reason in reason_to_stop


class EarlyStoppingX(Callback):
    """A foreign callback whose name begins like Lightning's."""

    def state_dict(self):
        return {"seen": 3}


class EarlyStoppingWithOwnState(EarlyStopping):
    """A subclass that stores another state than Lightning's."""

    def state_dict(self):
        return {"seen": 3}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tiny_base) -> dict:
    epochs, checkpoint = train(tmp_path_factory.mktemp("run"), tiny_base, 9, patience=1)
    assert epochs == 2
    for callback in (EarlyStoppingX(), EarlyStoppingWithOwnState("val/loss")):
        checkpoint["callbacks"][callback.state_key] = callback.state_dict()
    return checkpoint


@pytest.mark.parametrize("word", ["last", "best"])
def test_last_and_best_resolve_to_one_file(folder, word):
    path = write_checkpoint(folder, f"{word}.ckpt")
    assert folder.checkpoint(word) == path
    other = {"last": "best", "best": "last"}[word]
    with pytest.raises(
        CheckpointError, match=rf"--ckpt_path {other}: .*{other}\.ckpt: there is no such .*{word}\.ckpt"
    ):
        folder.checkpoint(other)


def test_a_path_of_a_checkpoint_is_used_or_refused(folder, tmp_path, monkeypatch):
    path = write_checkpoint(folder, "last.ckpt")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder.checkpoint(path) == folder.checkpoint(str(path)) == path
    assert folder.checkpoint("~/runs/bot/checkpoints/last.ckpt") == path
    with pytest.raises(ConfigError, match=r"^--ckpt_path: s3://b/last\.ckpt is an address"):
        folder.checkpoint("s3://b/last.ckpt")
    with pytest.raises(CheckpointError, match="nothing was given"):
        folder.checkpoint("")


def test_hpc_resolves_to_the_newest_hpc_checkpoint(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"--ckpt_path hpc: .*there is no such checkpoint"):
        folder.checkpoint("hpc")
    for name in ("hpc_ckpt_2.ckpt", "hpc_ckpt_10.ckpt", "hpc_ckpt_x.ckpt"):
        (tmp_path / name).touch()
    assert folder.checkpoint("hpc") == tmp_path / "hpc_ckpt_10.ckpt"


def test_a_new_run_may_have_a_lock(folder):
    folder.path.mkdir(parents=True)
    (folder.path / ".lock").touch()
    assert folder.newest("never") is None


@pytest.mark.parametrize(
    ("callbacks", "over"),
    [
        ([EarlyStopping("val/loss", patience=1)], True),
        ([EarlyStoppingX(), EarlyStopping("val/loss", patience=1)], True),
        ([EarlyStopping("val/loss", patience=2)], False),
        ([EarlyStopping("train/loss", patience=1)], False),
        ([EarlyStopping("val/loss", mode="max", patience=1)], False),
        ([EarlyStoppingX()], False),
        ([EarlyStoppingWithOwnState("val/loss", patience=1)], False),
        ([], False),
    ],
)
def test_early_stopping_ends_a_run_by_the_options_of_this_start(stopped, callbacks, over):
    reason_to_stop = nothing_left(stopped, 9, -1, callbacks)
    assert (reason_to_stop is not None and "no better val/loss for 1 validations" in reason_to_stop) == over


@pytest.mark.parametrize(
    ("former", "now", "over"),
    [
        ({"stopping_threshold": 99.0}, {"stopping_threshold": 99.0}, True),
        ({"stopping_threshold": 99.0}, {"stopping_threshold": 1.0}, False),
        ({"stopping_threshold": 99.0}, {}, False),
        ({"divergence_threshold": 0.1}, {"divergence_threshold": 0.1}, True),
        ({"divergence_threshold": 0.1}, {"divergence_threshold": 0.2}, False),
    ],
)
def test_a_stopping_threshold_ends_a_run_until_it_is_changed(tmp_path, tiny_base, former, now, over):
    epochs, checkpoint = train(tmp_path, tiny_base, 9, **former)
    assert epochs == 1
    reason_to_stop = nothing_left(checkpoint, 9, -1, [EarlyStopping("val/loss", min_delta=1.0, **now)])
    assert (reason_to_stop is not None and "hreshold reached" in reason_to_stop) == over
