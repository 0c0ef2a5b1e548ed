"""N steps = k steps + a restart + N - k steps, to the bit, wherever the checkpoint was written."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

import synthetic
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.callbacks import RunCheckpoint
from phi3_lightning.callbacks.tensorboard import step_of

TINY = str(Path(__file__).parents[2] / "src/phi3_lightning/assets/tiny_phi3")
EPOCHS, BATCHES, ACCUMULATE = 2, 11, 3
VALIDATED = (3, 7)


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> str:
    """22 chats of uneven length: 11 micro-batches of 2, so that each epoch ends with a short window."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": " ".join(["so"] * n)}]}
        for n in range(1, 23)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class SaveEverywhere(pl.Callback):
    """Writes a checkpoint at each hook where people write one, or at one place only."""

    def __init__(self, folder: Path, only: str = "") -> None:
        self.folder = folder
        self.only = only

    def _save(self, trainer, name):
        if not trainer.sanity_checking and self.only in ("", name):
            trainer.save_checkpoint(self.folder / f"{name}.ckpt", weights_only=False)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._save(trainer, f"epoch {trainer.current_epoch} batch {batch_idx}")

    def on_validation_end(self, trainer, pl_module):
        self._save(trainer, f"epoch {trainer.current_epoch} validated {trainer.fit_loop.epoch_loop.batch_idx}")

    def on_train_epoch_end(self, trainer, pl_module):
        self._save(trainer, f"epoch {trainer.current_epoch} end")


class Record(pl.Callback):
    """The documents of every micro-batch that is trained, the loss of every validation, in order, and their steps."""

    def __init__(self) -> None:
        self.events: list[tuple] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.events.append((trainer.current_epoch, batch_idx, batch["document_ids"], step_of(trainer)))

    def on_validation_end(self, trainer, pl_module):
        self.events.append(("validated", trainer.callback_metrics["val/loss"].item(), step_of(trainer)))

    def after(self, epoch: int, batch: int, validated: bool) -> list[tuple]:
        """What follows a place: a window that it cuts is seen again from its start."""
        whole = (batch + 1) % ACCUMULATE == 0 or batch == BATCHES - 1
        first = batch + 1 if whole else batch - batch % ACCUMULATE
        before = (epoch, first - 1) if first else (epoch - 1, BATCHES - 1)
        start = next((index + 1 for index, event in enumerate(self.events) if event[:2] == before), 0)
        skip_validation = validated or not whole
        if skip_validation and start < len(self.events) and self.events[start][0] == "validated":
            start += 1
        return self.events[start:]


def run(
    chats: str, tmp_path: Path, *callbacks, ckpt: Path | None = None, precision="bf16-mixed", backend="peft", **data
):
    pl.seed_everything(5, verbose=False)
    module = Phi3LoRAModule(
        TINY,
        lora={"backend": backend, "lora_dropout": 0.2},
        optimizer={"lr": 1e-2, "weight_decay": 0.01},
        gradient_checkpointing="none",
    )
    options = {"batch_size": 2, "max_length": 64, "packing": False, "num_workers": 0, "val_fraction": 0.0, "val": chats}
    datamodule = ChatDataModule(train=chats, tokenizer=TINY, cache_dir=str(tmp_path.parent / "cache"), **options | data)
    record = Record()
    trainer = pl.Trainer(
        accelerator="cpu", precision=precision, max_epochs=EPOCHS, accumulate_grad_batches=ACCUMULATE,
        val_check_interval=4, limit_val_batches=2, gradient_clip_val=1.0, num_sanity_val_steps=0, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        enable_checkpointing=any(isinstance(callback, RunCheckpoint) for callback in callbacks),
        callbacks=[record, *callbacks],
    )  # fmt: skip
    module.configure_model()
    torch.manual_seed(torch.seed())  # what else has drawn random numbers in the process must not matter
    trainer.fit(module, datamodule, ckpt_path=ckpt, weights_only=True)
    return state(trainer), record


def state(trainer) -> dict[str, torch.Tensor]:
    tensors = {name: p.detach().clone() for name, p in trainer.lightning_module.named_parameters() if p.requires_grad}
    optimizer = trainer.optimizers[0].state_dict()
    for index, moments in optimizer["state"].items():
        tensors |= {f"{index} {name}": value for name, value in moments.items()}
    return tensors | {"lr": torch.tensor(optimizer["param_groups"][0]["lr"]), "step": torch.tensor(trainer.global_step)}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(scope="module")
def uninterrupted(chats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    final, record = run(chats, folder, SaveEverywhere(folder))
    return folder, final, record


PLACES = [
    *((epoch, "batch", batch) for epoch in range(EPOCHS) for batch in range(BATCHES)),
    *((epoch, "validated", batch) for epoch in range(EPOCHS) for batch in VALIDATED),
    *((epoch, "end", BATCHES - 1) for epoch in range(EPOCHS)),
]


@pytest.mark.parametrize(("epoch", "hook", "batch"), PLACES)
def test_restart_from_any_place_ends_in_the_same_bits(chats, tmp_path, uninterrupted, epoch, hook, batch):
    folder, final, record = uninterrupted
    place = f"epoch {epoch} end" if hook == "end" else f"epoch {epoch} {hook} {batch}"
    later = f"epoch {EPOCHS - 1} batch 6"
    resumed, again = run(chats, tmp_path, SaveEverywhere(tmp_path, later), ckpt=folder / f"{place}.ckpt")
    assert_same(resumed, final)
    assert again.events == record.after(epoch, batch, validated=hook != "batch")
    # and once more, from a checkpoint that the restarted run wrote in the middle of its last epoch
    if (tmp_path / f"{later}.ckpt").exists():
        assert_same(run(chats, tmp_path, ckpt=tmp_path / f"{later}.ckpt")[0], final)


def test_every_row_comes_once_an_epoch_in_another_order(uninterrupted):
    _, _, record = uninterrupted
    trained = [event for event in record.events if event[0] != "validated"]
    epochs = [
        [doc for e, _, rows, _ in trained if e == epoch for row in rows for doc in row] for epoch in range(EPOCHS)
    ]
    assert all(sorted(documents) == list(range(22)) for documents in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("data", [{"packing": True, "num_workers": 2}, {"packing": False, "num_workers": 0}])
def test_restart_with_packing_workers_and_precisions(chats, tmp_path, precision, data):
    final, _ = run(chats, tmp_path, SaveEverywhere(tmp_path), precision=precision, **data)
    resumed, _ = run(chats, tmp_path, ckpt=tmp_path / "epoch 0 batch 1.ckpt", precision=precision, **data)
    assert_same(resumed, final)


def test_restart_with_loralib(chats, tmp_path):
    final, _ = run(chats, tmp_path, SaveEverywhere(tmp_path), backend="loralib")
    assert any(name.endswith("qkv_proj.lora_A") for name in final)
    for place in ("epoch 0 batch 1", "epoch 0 validated 7", "epoch 0 end"):
        resumed, _ = run(chats, tmp_path, ckpt=tmp_path / f"{place}.ckpt", backend="loralib")
        assert_same(resumed, final)


def test_run_checkpoint_is_such_a_place(chats, tmp_path):
    final, _ = run(chats, tmp_path)
    for every in (1, 3):
        folder = tmp_path / str(every)
        with pytest.raises(RuntimeError, match="power cut"):
            run(chats, tmp_path, RunCheckpoint(str(folder), every_n_steps=every), StopAt(batch=12))
        resumed, _ = run(chats, tmp_path, RunCheckpoint(str(folder)), ckpt=folder / "last.ckpt")
        assert_same(resumed, final)


AVERAGES = {
    "exponential": lambda: EMAWeightAveraging(decay=0.7),
    "exponential, late and seldom": lambda: EMAWeightAveraging(
        decay=0.7, update_every_n_steps=2, update_starting_at_step=2, use_buffers=False
    ),
    "equal": lambda: WeightAveraging(),
    "several at once": lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.7)),
}


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.parametrize(
    "kind", ["exponential", *(pytest.param(kind, marks=pytest.mark.slow) for kind in [*AVERAGES][1:])]
)
def test_current_and_averaged_weights_are_restored(chats, tmp_path, kind):
    def averaged(callback) -> list[torch.Tensor]:
        return [p.detach().clone() for p in callback._average_model.module.parameters() if p.requires_grad]

    first = AVERAGES[kind]()
    last = Last()
    run(chats, tmp_path, first, SaveEverywhere(tmp_path), last)
    for place in ("epoch 0 batch 3", "epoch 0 validated 7", "epoch 0 end"):
        again, rest = AVERAGES[kind](), Last()
        run(chats, tmp_path, again, rest, ckpt=tmp_path / f"{place}.ckpt")
        assert_same(rest.state, last.state)
        assert all(map(torch.equal, averaged(again), averaged(first)))
    assert not torch.equal(torch.cat([a.flatten() for a in averaged(first)]), last.flat)


class Last(pl.Callback):
    """What is trained, as the last step left it."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.state = state(trainer)
        self.flat = torch.cat([p.detach().flatten() for p in pl_module.trained_parameters()])


class StopAt(pl.Callback):
    """Kills a run before it can tidy up."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            raise RuntimeError("power cut")


def test_negative_control_without_the_seed_of_each_micro_batch(chats, tmp_path, uninterrupted, monkeypatch):
    folder, final, _ = uninterrupted
    monkeypatch.setattr("phi3_lightning.checkpoint.resume.seed_by_position", lambda *position: None)
    resumed, _ = run(chats, tmp_path, ckpt=folder / "epoch 0 batch 5.ckpt")
    assert not all(torch.equal(resumed[name], final[name]) for name in final)


def test_an_epoch_without_validation_is_not_taken_up_again(tmp_path):
    rows = [synthetic.batch_of([[synthetic.document(9, 5, seed)]]) for seed in range(4)]
    base = synthetic.save_tiny(tmp_path / "base")

    class Seen(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            windows.append(len(pl_module._window.micro_batches))

    windows: list[int] = []
    for steps, resume in ((2, None), (4, str(tmp_path / "last.ckpt"))):  # an epoch has two windows of two
        synthetic.trainer(
            tmp_path, callbacks=[Seen(), RunCheckpoint(str(tmp_path))], max_steps=steps, max_epochs=-1,
            accumulate_grad_batches=2, enable_checkpointing=True,
        ).fit(Phi3LoRAModule(base, dtype="float32"), synthetic.loader(rows), ckpt_path=resume)  # fmt: skip
    assert windows == [2, 2, 2, 2]
