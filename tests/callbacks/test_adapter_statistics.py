"""At which steps adapter statistics are logged, and under which names."""

import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.callbacks import AdapterStatistics
from phi3_lightning.errors import ConfigError

BATCHES = [synthetic.batch_of([[synthetic.document(12, 6, seed)]]) for seed in range(8)]


def logged_rows(folder, base, every=2, **options) -> tuple[list[dict[str, str]], Phi3LoRAModule]:
    module = Phi3LoRAModule(base, dtype="float32", lora={"r": 4, "lora_dropout": 0.0}, optimizer={"lr": 1e-2})
    logger = CSVLogger(folder, name="", version="")
    synthetic.trainer(folder, logger=logger, log_every_n_steps=1, callbacks=[AdapterStatistics(every)], **options).fit(
        module, synthetic.loader(BATCHES)
    )
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines())), module


def points(rows, name) -> dict[int, float]:
    return {int(row["step"]): float(row[name]) for row in rows if row.get(name)}


def test_statistics_share_the_step_axis_of_losses(tmp_path, tiny_base):
    rows, _ = logged_rows(tmp_path, tiny_base, accumulate_grad_batches=2)
    assert list(points(rows, "train/loss")) == [0, 1, 2, 3]
    assert list(points(rows, "adapter/relative_norm/q_proj")) == [0, 2]
    assert points(rows, "adapter/relative_norm/q_proj")[0] == 0 < points(rows, "adapter/relative_norm/q_proj")[2]


def test_statistics_are_logged_by_kind_and_by_layer(tmp_path, tiny_base):
    rows, _ = logged_rows(tmp_path, tiny_base)
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for kind in kinds:
        mean = points(rows, f"adapter/effective_rank/{kind}")
        layers = [points(rows, f"adapter_layers/effective_rank/{layer}.{kind}") for layer in ("00", "01")]
        assert mean[6] == pytest.approx((layers[0][6] + layers[1][6]) / 2)


def test_gradient_norms_add_up_to_train_grad_norm(tmp_path, tiny_base):
    """They are taken over an accumulation window and before clipping, like train/grad_norm, of which they are parts."""
    rows, _ = logged_rows(tmp_path, tiny_base, accumulate_grad_batches=2, gradient_clip_val=1e-3)
    for step in (0, 2):
        kinds = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
        parts = torch.tensor([points(rows, f"adapter/grad_norm/{kind}")[step] for kind in kinds])
        assert parts.norm().item() == pytest.approx(points(rows, "train/grad_norm")[step], rel=1e-5)
        assert parts.norm().item() > 1e-3


def test_without_a_logger_nothing_is_measured(tmp_path, tiny_base, monkeypatch):
    monkeypatch.setattr("phi3_lightning.callbacks.adapter_statistics.scalars", lambda _: pytest.fail("measured"))
    module = Phi3LoRAModule(tiny_base, dtype="float32")
    synthetic.trainer(tmp_path, callbacks=[AdapterStatistics(1)]).fit(module, synthetic.loader(BATCHES))


def test_an_interval_of_zero_steps_is_refused():
    with pytest.raises(ConfigError, match=r"monitor.adapter_every_n_steps: 0"):
        AdapterStatistics(0)
