"""A resumed run has one value per step in TensorBoard, from the starts that led to the model."""

import time
from contextlib import nullcontext

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.callbacks import PurgeOvertaken
from phi3_lightning.callbacks.tensorboard import boards, step_of
from phi3_lightning.event_files import read_scalars

DATA = [synthetic.batch_of([[synthetic.document(9, 5, seed)]]) for seed in range(12)]
pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Kill(Callback):
    """Writes checkpoints at given hooks and steps, and ends the run before a step."""

    def __init__(self, folder, *places: tuple[str, int], before: int | None = None) -> None:
        self.folder, self.places, self.before = folder, places, before

    def _save(self, trainer, hook):
        if (hook, trainer.global_step) in self.places:
            trainer.save_checkpoint(self.folder / "last.ckpt", weights_only=False)

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.before:
            raise RuntimeError("killed")

    def on_train_batch_end(self, trainer, *_):
        for writer in boards(trainer):
            writer.add_text("words", "training", step_of(trainer))
        self._save(trainer, "batch")

    def on_validation_end(self, trainer, *_):
        for writer in boards(trainer):
            writer.add_text("answers", "validation", step_of(trainer))
        self._save(trainer, "validated")


def fit(folder, base, kill: Kill, steps: int, ckpt=None) -> None:
    begun = {path.name.split(".")[3] for path in folder.glob("tensorboard/events.*")}
    while str(int(time.time())) in begun:  # TensorBoard orders files by name, which has whole seconds
        time.sleep(0.02)
    logger = TensorBoardLogger(folder, name="", version="", sub_dir="tensorboard", default_hp_metric=False)
    trainer = synthetic.trainer(
        folder, callbacks=[PurgeOvertaken(), kill], logger=logger, max_steps=steps, max_epochs=-1,
        num_sanity_val_steps=0, log_every_n_steps=1, val_check_interval=3,
    )  # fmt: skip
    module = Phi3LoRAModule(base, dtype="float32", schedule={"name": "constant", "warmup": 0})
    data = synthetic.loader(DATA)
    ending = nullcontext() if kill.before is None else pytest.raises(RuntimeError, match="killed")
    with ending:
        trainer.fit(module, data, data, ckpt_path=ckpt, weights_only=True)
    logger.finalize("success")


def shown_steps(folder) -> dict[str, list[int]]:
    """The steps that TensorBoard shows; its own ``epoch`` comes with each group of numbers."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    tags = (tag for tag in events.Tags()["tensors"] if tag != "epoch")
    return {tag: [point.step for point in events.Tensors(tag)] for tag in tags}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_base) -> dict[str, list[int]]:
    folder = tmp_path_factory.mktemp("whole")
    fit(folder, tiny_base, Kill(folder), 10)
    steps = shown_steps(folder)
    assert steps["train/loss"] == list(range(10))
    assert steps["val/loss"] == [2, 5, 8]
    return steps


@pytest.mark.parametrize(
    ("places", "before"),
    [
        ([("batch", 5)], 8),
        ([("batch", 6)], 8),  # whose validation is repeated
        ([("batch", 6)], 9),
        ([("validated", 6)], 8),
        ([("batch", 1)], 2),
        ([], 4),  # without a checkpoint it starts again
    ],
)
def test_a_killed_and_resumed_run_shows_each_step_once(tmp_path, tiny_base, uninterrupted, places, before):
    fit(tmp_path, tiny_base, Kill(tmp_path, *places, before=before), 10)
    fit(tmp_path, tiny_base, Kill(tmp_path), 10, tmp_path / "last.ckpt" if places else None)
    assert shown_steps(tmp_path) == uninterrupted
    assert [step for step, _ in read_scalars(tmp_path / "tensorboard")["train/loss"]] == list(range(10))


def test_two_kills_and_a_shorter_rerun_show_each_step_once(tmp_path, tiny_base, uninterrupted):
    fit(tmp_path, tiny_base, Kill(tmp_path, ("batch", 3), before=8), 10)
    fit(tmp_path, tiny_base, Kill(tmp_path, ("batch", 6), before=9), 10, tmp_path / "last.ckpt")
    fit(tmp_path, tiny_base, Kill(tmp_path), 10, tmp_path / "last.ckpt")
    assert shown_steps(tmp_path) == uninterrupted
    fit(tmp_path, tiny_base, Kill(tmp_path), 7, tmp_path / "last.ckpt")  # a shorter run from the same checkpoint
    assert shown_steps(tmp_path)["train/loss"] == list(range(7))
    assert shown_steps(tmp_path)["val/loss"] == [2, 5]
