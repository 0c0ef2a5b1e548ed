"""Weight averaging over a frozen base: only adapters are averaged, saved and swapped."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim.swa_utils import get_ema_multi_avg_fn

import synthetic
from distributed import ranks
from phi3_lightning import FSDP2Strategy, Phi3LoRAModule
from phi3_lightning.callbacks import BaseDrift, RunCheckpoint, Samples, base_drift, samples
from phi3_lightning.checkpoint.averaging import CURRENT
from phi3_lightning.checkpoint.mixin import TrainableStateMixin
from phi3_lightning.errors import ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

BATCHES = [synthetic.batch_of([[synthetic.document(9, 5, seed)]], seed) for seed in range(4)]
KINDS = {  # 0.8 x + 0.2 x is not x in bfloat16, nor for a rotary angle in float32
    "exponential": lambda: EMAWeightAveraging(decay=0.8),
    "exponential, late and seldom": lambda: EMAWeightAveraging(
        decay=0.8, update_every_n_steps=2, update_starting_at_step=2, use_buffers=False, device="cpu"
    ),
    "equal": lambda: WeightAveraging(),
    "several at once": lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.8)),
}


def make_module(base: str, **options) -> Phi3LoRAModule:
    lora = {"r": 4, "target_modules": ["qkv_proj", "down_proj"], "lora_dropout": 0.2}
    constant = {"name": "constant", "warmup": 0}
    return Phi3LoRAModule(base, **{"lora": lora, "optimizer": {"lr": 1e-2}, "schedule": constant} | options)


class WeightLog(pl.Callback):
    """Records current and averaged adapters after each step, and frozen tensors during validation."""

    def __init__(self) -> None:
        self.current: list[torch.Tensor] = []
        self.frozen: list[list[torch.Tensor]] = []
        self.validated: list[torch.Tensor] = []
        self.averaged: torch.Tensor | None = None

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.current.append(flat(pl_module))
        (callback,) = (each for each in trainer.callbacks if isinstance(each, WeightAveraging))
        self.averaged = flat(callback._average_model.module)

    def on_validation_batch_start(self, trainer, pl_module, *args):
        self.frozen.append(frozen(pl_module))
        self.validated.append(flat(pl_module))


def frozen(module: torch.nn.Module) -> list[torch.Tensor]:
    """Frozen weights, and the model's buffers (rotary angles)."""
    weights = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    return [tensor.detach().clone() for tensor in [*weights, *module.model.buffers()]]


def flat(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters() if p.requires_grad])


def fit(base: str, folder: Path, callback, *more, module=None, ckpt=None, **options) -> tuple[WeightLog, pl.Trainer]:
    pl.seed_everything(3, verbose=False)
    weights = WeightLog()
    callbacks = [*([callback] if callback else []), *([weights] if callback else []), *more]
    keeps = any(isinstance(each, RunCheckpoint) for each in more)
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, "enable_checkpointing": keeps} | options
    trainer = synthetic.trainer(folder, callbacks=callbacks, **options)
    data = synthetic.loader(BATCHES)
    trainer.fit(make_module(base) if module is None else module, data, data, ckpt_path=ckpt, weights_only=True)
    return weights, trainer


@pytest.fixture(scope="module")
def bfloat16_base(tmp_path_factory) -> str:
    return synthetic.save_tiny(tmp_path_factory.mktemp("bfloat16") / "base", torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_averaged_and_no_frozen_bit_changes(tmp_path, bfloat16_base, kind):
    module = make_module(bfloat16_base)
    module.configure_model()
    before = frozen(module)
    weights, _ = fit(bfloat16_base, tmp_path, KINDS[kind](), module=module)
    expected = weights.current[0]
    for step, current in enumerate(weights.current[1:], 1):
        if kind == "equal":
            expected = expected + (current - expected) / (step + 1)
        elif kind != "exponential, late and seldom":
            expected = 0.8 * expected + 0.2 * current
        elif step >= 2 and step % 2 == 0:
            expected = current if step == 2 else 0.8 * expected + 0.2 * current
    torch.testing.assert_close(weights.averaged, expected)
    assert not torch.equal(weights.averaged, weights.current[-1])
    assert torch.equal(weights.validated[-1], weights.averaged)  # validations measure the average
    assert torch.equal(flat(module), weights.averaged)  # the run ends with the averaged weights
    assert all(all(map(torch.equal, before, seen)) for seen in [*weights.frozen, frozen(module)])


class Chats(pl.LightningDataModule):
    """Batches, with a tokenizer whose tokens are numbers."""

    tokenizer = SimpleNamespace(
        eos_token_id=None,
        added_tokens_decoder={},
        decode=lambda ids, **_: str(ids),
        batch_decode=lambda rows, **_: list(map(str, rows)),
    )

    def train_dataloader(self):
        return synthetic.loader(BATCHES)

    val_dataloader = train_dataloader


def adapters(model: torch.nn.Module) -> torch.Tensor:
    """Like ``flat``, but also while the adapter is switched off and nothing requires a gradient."""
    return torch.cat([p.detach().flatten().clone() for name, p in model.named_parameters() if "lora_" in name])


@pytest.mark.parametrize("first", [True, False], ids=["averaging first", "averaging last"])
def test_samples_and_drift_show_the_averaged_weights(tmp_path, tiny_base, monkeypatch, first):
    sampled, compared = [], []
    generate, compare = samples.generate, base_drift.compare
    monkeypatch.setattr(
        samples, "generate", lambda model, *args: sampled.append(adapters(model)) or generate(model, *args)
    )
    monkeypatch.setattr(
        base_drift, "compare", lambda module, batch: compared.append(adapters(module)) or compare(module, batch)
    )

    def run(*shown):
        pl.seed_everything(3, verbose=False)
        weights, averaging = WeightLog(), [EMAWeightAveraging(decay=0.8)]
        callbacks = [*averaging, *shown, weights] if first else [*shown, *averaging, weights]
        options = {"max_epochs": 3, "check_val_every_n_epoch": 2, "num_sanity_val_steps": 0}
        trainer = synthetic.trainer(tmp_path, callbacks=callbacks, **options)
        module = make_module(tiny_base, generation={"max_new_tokens": 4})
        trainer.fit(module, Chats())
        return weights, flat(module)

    weights, last = run(Samples(), BaseDrift(Chats()))
    _, validated, ended = sampled  # the first is the base's
    assert torch.equal(validated, weights.validated[0])
    assert all(torch.equal(each, weights.validated[0]) for each in compared)
    assert torch.equal(ended, last)
    assert torch.equal(last, weights.averaged)
    assert not torch.equal(validated, weights.current[7])
    without, last_without = run()
    assert torch.equal(weights.current[-1], without.current[-1])
    assert torch.equal(last, last_without)


def test_a_copy_of_the_base_is_never_made(tmp_path, tiny_base):
    module = make_module(tiny_base)
    module.configure_model()
    callback = EMAWeightAveraging()
    fit(tiny_base, tmp_path, callback, module=module, max_epochs=1)
    copies = dict(callback._average_model.module.named_parameters())
    shared = {name for name, p in module.named_parameters() if copies[name].data_ptr() == p.data_ptr()}
    assert shared == {name for name, p in module.named_parameters() if not p.requires_grad}


def test_checkpoints_hold_averaged_and_current_adapters_and_evaluation_uses_the_averaged(tmp_path, tiny_base):
    weights, trainer = fit(tiny_base, tmp_path, EMAWeightAveraging(decay=0.8), RunCheckpoint(str(tmp_path)))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    trained = {name for name, p in trainer.lightning_module.named_parameters() if p.requires_grad}
    assert saved["state_dict"].keys() == saved[CURRENT].keys() == trained
    assert saved["averaging_state"].keys() == {"n_averaged"}
    assert torch.equal(torch.cat([saved[CURRENT][name].flatten() for name in saved[CURRENT]]), weights.current[-1])
    loaded = Phi3LoRAModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(flat(loaded), weights.averaged)
    expected = trainer.callback_metrics["val/loss"]
    module = make_module(tiny_base)
    (found,) = synthetic.trainer(tmp_path).validate(
        module, synthetic.loader(BATCHES), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False
    )
    assert found["val/loss"] == expected.item()


class Stop(pl.Callback):
    """Requests a stop in the second validation, as a scheduler does."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, *args):
        if trainer.current_epoch == 1 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_stop_during_validation_resumes_exactly(tmp_path, tiny_base):
    whole, _ = fit(tiny_base, tmp_path, EMAWeightAveraging(decay=0.8), max_epochs=3)
    with pytest.raises(SIGTERMException):
        fit(tiny_base, tmp_path, EMAWeightAveraging(decay=0.8), Stop(), RunCheckpoint(str(tmp_path)), max_epochs=3)
    again, _ = fit(tiny_base, tmp_path, EMAWeightAveraging(decay=0.8), ckpt=tmp_path / "last.ckpt", max_epochs=3)
    assert torch.equal(again.averaged, whole.averaged)
    assert torch.equal(again.current[-1], whole.current[-1])


@pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging")
def test_averaging_can_be_switched_off_and_on_when_resuming(tmp_path, tiny_base):
    plain, _ = fit(tiny_base, tmp_path, EMAWeightAveraging(decay=0.8), max_epochs=3)
    fit(tiny_base, tmp_path, EMAWeightAveraging(decay=0.8), RunCheckpoint(str(tmp_path)), max_epochs=1)
    _, without = fit(tiny_base, tmp_path, None, ckpt=tmp_path / "last.ckpt", max_epochs=3)
    assert torch.equal(flat(without.lightning_module), plain.current[-1])  # averaging never changes the trained weights
    fit(tiny_base, tmp_path / "plain", None, RunCheckpoint(str(tmp_path / "plain")), max_epochs=1)
    begun, _ = fit(tiny_base, tmp_path, EMAWeightAveraging(decay=0.8), ckpt=tmp_path / "plain/last.ckpt", max_epochs=3)
    assert torch.equal(begun.current[-1], plain.current[-1])
    expected = plain.current[4]
    for current in plain.current[5:]:
        expected = 0.8 * expected + 0.2 * current
    torch.testing.assert_close(begun.averaged, expected)


def test_a_checkpoint_that_contains_the_base_resumes(tmp_path, tiny_base):
    _, trainer = fit(tiny_base, tmp_path, EMAWeightAveraging(decay=0.8), RunCheckpoint(str(tmp_path)), max_epochs=1)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    saved[CURRENT] |= {n: p.detach() for n, p in trainer.lightning_module.named_parameters() if not p.requires_grad}
    torch.save(saved, tmp_path / "old.ckpt")
    new, _ = fit(tiny_base, tmp_path, EMAWeightAveraging(decay=0.8), ckpt=tmp_path / "last.ckpt")
    old, _ = fit(tiny_base, tmp_path, EMAWeightAveraging(decay=0.8), ckpt=tmp_path / "old.ckpt")
    assert torch.equal(old.averaged, new.averaged)


class Normalised(TrainableStateMixin):
    """A frozen layer, a trained one, and statistics that are part of the state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = torch.nn.Linear(4, 8).requires_grad_(False)
        self.norm = torch.nn.BatchNorm1d(8)
        self.head = torch.nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        return self.head(self.norm(self.backbone(batch))).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([*self.norm.parameters(), *self.head.parameters()], lr=0.1)


def test_a_foreign_module_averages_its_buffers_too(tmp_path):
    data = synthetic.loader([torch.randn(3, 4, generator=torch.Generator().manual_seed(n)) for n in range(4)])
    module, callback = Normalised(), EMAWeightAveraging(decay=0.8)
    trainer = synthetic.trainer(tmp_path, callbacks=[callback], max_epochs=1)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {name.partition(".")[0] for name in saved["state_dict"]} == {"norm", "head"}
    assert "norm.running_mean" in saved["state_dict"]
    assert saved["state_dict"].keys() == saved[CURRENT].keys()
    again = Normalised()
    trainer = synthetic.trainer(tmp_path, callbacks=[EMAWeightAveraging(decay=0.8)], max_epochs=2)
    trainer.fit(again, data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert trainer.global_step == 8


@pytest.mark.parametrize(
    ("callback", "strategy", "message"),
    [
        (lambda: StochasticWeightAveraging(1e-2), lambda: "auto", "use WeightAveraging"),
        (EMAWeightAveraging, FSDP2Strategy, r"use trainer\.strategy: ddp"),
    ],
)
def test_unsupported_combinations_are_refused_by_name(tmp_path, tiny_base, callback, strategy, message):
    def run():
        module = make_module(tiny_base)
        trainer = synthetic.trainer(tmp_path, callbacks=[callback()], strategy=strategy())
        with pytest.raises(ConfigError, match=rf"^trainer\.callbacks: .*{message}"):
            trainer.fit(module, synthetic.loader(BATCHES))
        return module.model is None  # nothing was loaded

    assert ranks.run(tmp_path, 1, run) == [True]  # in its own process: strategies leave torch.distributed initialised
