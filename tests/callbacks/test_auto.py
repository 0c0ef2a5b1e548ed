"""``auto`` is decided by memory when a run begins, and does not change what is learnt."""

from pathlib import Path

import pytest
import torch

import phi3_lightning
import synthetic
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.callbacks import AutoBatchSize, AutoCheckpointing, auto
from phi3_lightning.errors import CheckpointError, ConfigError
from phi3_lightning.model.activation_checkpointing import mode_of
from phi3_lightning.planning.spec import RunSpec

TINY = Path(phi3_lightning.__file__).parent / "assets" / "tiny_phi3"
GB = 10**9


@pytest.fixture
def set_memory(monkeypatch):
    """Set the free and the total memory that the device reports."""
    return lambda free, total=None: monkeypatch.setattr(auto, "device_memory", lambda _: (free, total or free))


@pytest.fixture
def set_rows_that_fit(monkeypatch):
    """Set the number of rows that fit; return the list of shapes that are planned."""
    shapes = []

    def set_rows(rows: int) -> list:
        monkeypatch.setattr(auto, "rows_that_fit", lambda spec, shape, room: shapes.append(shape) or (rows, "none"))
        return shapes

    return set_rows


def chats(tmp_path, **options) -> ChatDataModule:
    options = {"max_length": 256, "num_workers": 0, "val_fraction": 0.1, "batch_size": 2, "seed": 1} | options
    options = {"train": str(TINY / "chats_train.jsonl")} | options
    return ChatDataModule(tokenizer=str(TINY), cache_dir=str(tmp_path / "cache"), **options)


def trainer(tmp_path, **options) -> synthetic.pl.Trainer:
    options = {"callbacks": [AutoBatchSize(), AutoCheckpointing()], "limit_val_batches": 0} | options
    return synthetic.trainer(tmp_path, **options)


# ---------------------------------------------------------------- gradient checkpointing


def test_auto_checkpointing_uses_the_mode_that_fits_and_logs_it(tmp_path, set_memory, caplog):
    modes = {}
    for free in (10 * GB, 30 * 10**6):
        set_memory(free)
        caplog.clear()
        module = Phi3LoRAModule(str(TINY))
        with caplog.at_level("INFO"):
            trainer(tmp_path, max_steps=1).fit(module, chats(tmp_path))
        modes[free] = mode_of(module.model)
        decided, logged = (caplog.text.index(text) for text in ("auto is ", "; gradient checkpointing: "))
        assert f"auto is {modes[free]}: the largest batch takes" in caplog.text[decided:logged]
        assert caplog.text[logged:].startswith(f"; gradient checkpointing: {modes[free]}")
    assert modes == {10 * GB: "none", 30 * 10**6: "full"}


def test_without_the_callback_auto_means_full(tmp_path, set_memory):
    set_memory(10 * GB)
    module = Phi3LoRAModule(str(TINY))
    trainer(tmp_path, max_steps=1, callbacks=[]).fit(module, chats(tmp_path))
    assert mode_of(module.model) == "full"


def test_a_configured_mode_is_kept(tmp_path, set_memory):
    set_memory(10 * GB)
    module = Phi3LoRAModule(str(TINY), gradient_checkpointing="selective")
    trainer(tmp_path, max_steps=1).fit(module, chats(tmp_path))
    assert mode_of(module.model) == "selective"


def test_auto_means_full_where_row_lengths_are_unknown(tmp_path, tiny_base):
    module = Phi3LoRAModule(tiny_base)
    batch = synthetic.batch_of([[synthetic.document(9, 5, 0)]])
    trainer(tmp_path, max_steps=1).fit(module, synthetic.loader([batch]))
    assert mode_of(module.model) == "full"


def test_a_base_made_in_memory_is_planned_too(tmp_path, set_memory):
    set_memory(10 * GB)
    model = Phi3LoRAModule(str(TINY))
    model.configure_model()
    base = model.detach_adapter()
    base.name_or_path = ""
    module = Phi3LoRAModule(base)
    trainer(tmp_path, max_steps=1).fit(module, chats(tmp_path))
    assert mode_of(module.model) == "none"


# ---------------------------------------------------------------- batch size


def train_epoch(tmp_path, **options) -> tuple[torch.Tensor, int, int]:
    """Weights after an epoch, and its numbers of steps and micro-batches."""
    synthetic.pl.seed_everything(0, verbose=False)
    module = Phi3LoRAModule(str(TINY), lora={"lora_dropout": 0.0}, gradient_checkpointing="none")
    run = trainer(tmp_path, accumulate_grad_batches=options.pop("accumulate", 1))
    lines = (TINY / "chats_train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join(lines[:80]), encoding="utf-8")
    run.fit(module, chats(tmp_path, train=str(tmp_path / "some.jsonl"), **options))
    weights = torch.cat([parameter.detach().flatten() for parameter in module.trained_parameters()])
    return weights, run.global_step, run.num_training_batches


@pytest.mark.parametrize(
    ("rows", "each", "packing"), [(100, 6, True), (2, 2, True), (3, 3, True), (1, 1, True), (3, 3, False)]
)
def test_an_optimiser_step_keeps_its_rows(tmp_path, set_rows_that_fit, rows, each, packing):
    """Each step has six rows, one at a time or as many together as fit."""
    set_rows_that_fit(rows)
    weights, steps, count = train_epoch(
        tmp_path, max_tokens_per_batch="auto", batch_size=2, accumulate=3, packing=packing
    )
    expected, *same = train_epoch(tmp_path, batch_size=each, accumulate=6 // each, packing=packing)
    assert [steps, count] == same
    assert torch.equal(weights, expected)


def test_another_trainer_and_a_second_fit_keep_the_rows_of_a_step_too(tmp_path, set_rows_that_fit):
    set_rows_that_fit(3)
    data = chats(tmp_path, max_tokens_per_batch="auto", batch_size=2)
    callbacks = [AutoBatchSize()]
    for accumulation, micro_batches in ((3, 2), (6, 4)):
        run = trainer(tmp_path, accumulate_grad_batches=accumulation, max_steps=1, callbacks=callbacks)
        for _ in range(2):
            run.fit(Phi3LoRAModule(str(TINY), gradient_checkpointing="none"), data)
            assert run.accumulate_grad_batches == micro_batches
            assert len(data.largest_train_batch()["document_lengths"]) == 3


def test_a_second_auto_batch_size_changes_nothing(tmp_path, set_rows_that_fit):
    set_rows_that_fit(3)
    data = chats(tmp_path, max_tokens_per_batch="auto", batch_size=2)
    run = trainer(tmp_path, accumulate_grad_batches=3, max_steps=1, callbacks=[AutoBatchSize(), AutoBatchSize()])
    run.fit(Phi3LoRAModule(str(TINY), gradient_checkpointing="none"), data)
    assert run.accumulate_grad_batches == 2


def test_auto_batch_size_plans_with_the_largest_row(tmp_path, set_rows_that_fit):
    shapes = set_rows_that_fit(3)
    module = Phi3LoRAModule(str(TINY), gradient_checkpointing="none")
    for options in ({}, {"packing": False}):
        data = chats(tmp_path, max_tokens_per_batch="auto", **options)
        trainer(tmp_path, max_steps=1).fit(module, data)
        row = shapes.pop()
        alone = chats(tmp_path, batch_size=1, **options)
        alone.prepare_data()
        alone.setup("fit")
        assert row.lengths == alone.largest_train_batch()["document_lengths"]


@pytest.mark.slow
def test_auto_batch_size_follows_memory(tmp_path, set_memory, caplog):
    batches = []
    for total in (10 * GB, 1.4 * GB):
        set_memory(10 * GB, total)
        caplog.clear()
        with caplog.at_level("INFO"):
            *_, count = train_epoch(tmp_path, max_tokens_per_batch="auto", batch_size=64)
        batches.append(count)
        assert "rows fit into 85% of" in caplog.text
        assert "to an optimiser step of 64 rows" in caplog.text
    assert batches[0] < batches[1]


def test_auto_batch_size_plans_streams_with_full_rows(tmp_path, set_rows_that_fit):
    shapes = set_rows_that_fit(3)
    data = chats(tmp_path, streaming=True, max_tokens_per_batch="auto", batch_size=3, val_fraction=0.0)
    sizes = []

    class Sized(Phi3LoRAModule):
        def training_step(self, batch, batch_idx):
            sizes.append(len(batch["document_lengths"]))
            return super().training_step(batch, batch_idx)

    module = Sized(str(TINY), gradient_checkpointing="none")
    trainer(tmp_path, max_steps=2, max_epochs=-1).fit(module, data)
    assert [shape.lengths for shape in shapes] == [[[256]]]
    assert sizes == [3, 3]


def test_resuming_within_an_epoch_with_other_memory_is_refused(tmp_path, set_rows_that_fit):
    def fit(steps: int, checkpoint=None):
        module = Phi3LoRAModule(str(TINY), gradient_checkpointing="none")
        run = trainer(tmp_path, max_steps=steps)
        run.fit(module, chats(tmp_path, max_tokens_per_batch="auto", batch_size=4), ckpt_path=checkpoint)
        run.save_checkpoint(tmp_path / "last.ckpt")

    set_rows_that_fit(2)
    fit(1)
    fit(2, tmp_path / "last.ckpt")
    set_rows_that_fit(4)
    with pytest.raises(CheckpointError, match="batch_size was 2, now 4"):
        fit(3, tmp_path / "last.ckpt")


def validate(tmp_path, monkeypatch, *, validation_tokens: int, on_gpu: bool = True, **options) -> tuple[list, dict]:
    """The rows of each micro-batch of the validation after a step, and its metrics."""
    monkeypatch.setattr(auto, "tokens_that_validate", lambda spec, shape, room: validation_tokens)
    monkeypatch.setattr(RunSpec, "on_gpu", on_gpu)
    sizes = []

    class Sized(Phi3LoRAModule):
        def validation_step(self, batch, batch_idx):
            sizes.append(len(batch["document_lengths"]))
            return super().validation_step(batch, batch_idx)

    synthetic.pl.seed_everything(0, verbose=False)
    module = Sized(str(TINY), gradient_checkpointing="none", objective=options.pop("objective", {}))
    limit = options.pop("limit_val_batches", 1.0)
    run = trainer(tmp_path, max_steps=1, limit_val_batches=limit, val_check_interval=1, num_sanity_val_steps=0)
    data = chats(tmp_path, max_tokens_per_batch="auto", batch_size=2, val_fraction=0.5, **options)
    run.fit(module, data)
    return sizes, {name: value.item() for name, value in run.callback_metrics.items() if name.startswith("val/")}


@pytest.mark.slow
def test_validation_has_micro_batches_of_its_own_and_the_same_metrics(tmp_path, monkeypatch, set_rows_that_fit):
    set_rows_that_fit(2)
    small, expected = validate(tmp_path, monkeypatch, validation_tokens=512)
    large, found = validate(tmp_path, monkeypatch, validation_tokens=8 * 256)
    assert (max(small), max(large)) == (2, 8)
    assert sum(small) == sum(large)
    assert found == pytest.approx(expected, rel=1e-3)  # bfloat16 products of other sizes may round otherwise
    assert len(found) == 3


@pytest.mark.parametrize("case", ["less fits", "cpu", "limit"])
def test_validation_keeps_the_size_of_training(tmp_path, monkeypatch, set_rows_that_fit, case):
    """Larger is no faster on a CPU, and a number of batches to validate would mean more rows."""
    set_rows_that_fit(2)
    options = {"cpu": {"on_gpu": False}, "limit": {"limit_val_batches": 3}}.get(case, {})
    found, _ = validate(tmp_path, monkeypatch, validation_tokens=1 if case == "less fits" else 2048, **options)
    assert max(found) == 2


def test_several_ranks_share_a_validation_evenly(tmp_path):
    data = chats(tmp_path, max_tokens_per_batch="auto", val_fraction=0.5)
    data.prepare_data()
    data.setup("fit")
    plans = data._splits
    sizes = []
    for ranks in (1, 2, 1000):
        plans.decide(1, 10**6, ranks)
        sizes.append(len(plans.plans["val"]))
    rows = len(plans.plans["val"].rows) - 1
    assert sizes[0] == 1
    assert 8 <= sizes[1] <= 10
    assert sizes[2] == rows


class Plain(synthetic.pl.LightningModule):
    """A module of another project."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_module_whose_memory_cannot_be_predicted_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"data\.max_tokens_per_batch: auto .* Plain is another module; give a number"
    ):
        trainer(tmp_path).fit(Plain(), chats(tmp_path, max_tokens_per_batch="auto"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("module", [Plain, lambda: Phi3LoRAModule(str(TINY))], ids=["foreign", "ours"])
def test_auto_batch_size_without_its_callback_is_refused(tmp_path, module, streaming):
    data = chats(tmp_path, max_tokens_per_batch="auto", val_fraction=0.0, streaming=streaming)
    with pytest.raises(
        ConfigError, match=r"data\.max_tokens_per_batch: auto .*callbacks\.AutoBatchSize.*give a number"
    ):
        trainer(tmp_path, callbacks=[], max_steps=1).fit(module(), data)


def test_auto_batch_size_without_its_callback_is_refused_in_a_second_fit(tmp_path, set_rows_that_fit):
    set_rows_that_fit(3)
    data = chats(tmp_path, max_tokens_per_batch="auto")
    module = Phi3LoRAModule(str(TINY), gradient_checkpointing="none")
    trainer(tmp_path, max_steps=1).fit(module, data)
    with pytest.raises(ConfigError, match="AutoBatchSize"):
        trainer(tmp_path, max_steps=1, callbacks=[]).fit(module, data)


def test_auto_uses_batch_size_outside_of_training(tmp_path):
    data = chats(tmp_path, max_tokens_per_batch="auto", batch_size=2)
    data.prepare_data()
    data.setup("validate")
    assert {len(batch["document_lengths"]) for batch in data.val_dataloader()} == {2}
    with pytest.raises(ConfigError, match=r"data\.max_tokens_per_batch: 'most' cannot be used: give a whole"):
        chats(tmp_path, max_tokens_per_batch="most")
