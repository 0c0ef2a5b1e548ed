"""Trainer options that Lightning refuses are named, and programming errors keep their traceback."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer

from phi3_lightning.commands.trainer_options import check_ranges, refused_by_name
from phi3_lightning.errors import ConfigError, DataError

BUILT = [
    {"strategy": "dpp"},
    {"strategy": "fsdp"},
    {"strategy": "xla"},
    {"devices": 0},
    {"devices": []},
    {"devices": "abc"},
    {"num_nodes": 0},
    {"accelerator": "foo"},
    {"gradient_clip_algorithm": "wrong"},
    {"val_check_interval": 1.5},
    {"val_check_interval": "soon"},
    {"max_time": "abc"},
    {"max_time": {"foo": 3}},
    {"max_epochs": -5},
    {"max_steps": -7},
    {"limit_train_batches": -1},
    {"limit_val_batches": 1.5},
    {"overfit_batches": 1.7},
    {"profiler": "foo"},
    {"reload_dataloaders_every_n_epochs": -1},
    {"fast_dev_run": -3},
    {"barebones": True, "enable_checkpointing": True},
]


@pytest.mark.parametrize("options", BUILT, ids=str)
def test_an_option_that_the_trainer_refuses_is_named(options):
    section = {"accelerator": "cpu"} | options
    with (
        pytest.raises(ConfigError, match=rf"^trainer\.{next(iter(options))}: [^\n]+$"),
        refused_by_name(section, building=True),
    ):
        pl.Trainer(**section)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accumulate_grad_batches", 0),
        ("accumulate_grad_batches", -1),
        ("gradient_clip_val", -1.0),
        ("val_check_interval", 0),
        ("val_check_interval", -0.5),
        ("check_val_every_n_epoch", 0),
        ("log_every_n_steps", -1),
        ("num_sanity_val_steps", -2),
        ("min_epochs", -1),
        ("min_steps", -1),
    ],
)
def test_numbers_that_lightning_accepts_but_cannot_use_are_refused(name, value):
    pl.Trainer(accelerator="cpu", logger=False, **{name: value}) if value != -0.5 else None  # Lightning accepts it
    with pytest.raises(ConfigError, match=rf"^trainer\.{name}: {value} cannot be used: it is "):
        check_ranges({name: value})


def test_usual_numbers_are_accepted():
    check_ranges(
        {"accumulate_grad_batches": 1, "gradient_clip_val": 0, "val_check_interval": "00:01:00:00", "num_nodes": 1,
         "check_val_every_n_epoch": None, "log_every_n_steps": 0, "num_sanity_val_steps": -1}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "make"),
    [("EarlyStopping", lambda: EarlyStopping("val/loss", mode="foo")), ("Timer", lambda: Timer(duration="abc"))],
)
def test_a_class_that_cannot_be_built_is_named(kind, make):
    section = {"callbacks": [{"class_path": f"lightning.pytorch.callbacks.{kind}"}]}
    with pytest.raises(ConfigError, match=rf"^trainer\.callbacks: .*{kind}"), refused_by_name(section, building=True):
        make()


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch.float()).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Fails(Plain):
    def training_step(self, batch, batch_idx):
        raise ValueError("the strategy of the devices is wrong")  # it mentions options, but is not about one


def fit(module: pl.LightningModule, **options) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    data = torch.utils.data.DataLoader(torch.zeros(4, 1))
    with refused_by_name(options, building=False):
        pl.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet, **options).fit(
            module, data, data
        )


def test_options_that_lightning_refuses_during_fit_are_named():
    with pytest.raises(ConfigError, match=r"^trainer\.val_check_interval: 100 cannot be used: "):
        fit(Plain(), val_check_interval=100)


def test_an_error_in_training_is_raised_unchanged():
    with pytest.raises(ValueError, match="the strategy of the devices"):
        fit(Fails())
    with pytest.raises(DataError, match=r"row 3"), refused_by_name({}, building=True):
        raise DataError("row 3")
    with pytest.raises(ZeroDivisionError), refused_by_name({"devices": 1}, building=True):
        _ = 1 / 0
