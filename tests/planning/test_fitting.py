"""What is ``auto`` fits into the memory that there is, by the plan, and changes nothing of what is learnt."""

import math
from pathlib import Path

import pytest
import torch

import phi3_lightning
import synthetic
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.errors import CheckpointError, ConfigError
from phi3_lightning.model.checkpointing import way_of
from phi3_lightning.planning import fitting
from phi3_lightning.planning.fitting import fastest, most_rows, upper_bound
from phi3_lightning.planning.memory import Setup
from phi3_lightning.planning.step import Shape

TINY = Path(phi3_lightning.__file__).parent / "assets" / "tiny_phi3"
WIDE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 8, "vocab_size": 500}
SHAPE = Shape([[70, 30], [60]], 110)
GB = 10**9


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> str:
    return synthetic.save_tiny(tmp_path_factory.mktemp("wide") / "base", torch.bfloat16, **WIDE)


@pytest.fixture
def remembered(monkeypatch) -> None:
    """Each plan is made once."""
    plan, plans = Setup.memory, {}

    def memory(self, shape, way=None):
        key = str((shape, way or self.way, self.process))
        if key not in plans:
            plans[key] = plan(self, shape, way)
        return plans[key]

    monkeypatch.setattr(Setup, "memory", memory)


@pytest.fixture
def memory(monkeypatch):
    """Pretend that the device has so much memory, free and in all."""
    return lambda free, total=None: monkeypatch.setattr(fitting, "device_memory", lambda _: (free, total or free))


def setup(base: str, **options) -> Setup:
    module = Phi3LoRAModule(base, **{"gradient_checkpointing": "auto", **options})
    return Setup(module, mixed=True, ranks=1, sharded=False, process=0.0)


def needed(run: Setup, way) -> float:
    found = run.memory(SHAPE, way)
    return found.total - found.base - found.process


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "float32"}, {"lora": {"backend": "loralib", "r": 64}}, {"lora": {"use_dora": True, "r": 2}},
     {"lora": {"modules_to_save": ["embed_tokens", "lm_head"]}}, {"lora": {"rank_pattern": {"down_proj": 200}}}],
    ids=["bfloat16", "float32", "loralib", "dora", "whole", "ranks"],
)  # fmt: skip
def test_the_bound_is_above_every_plan(tmp_path, options):
    changes = {"vocab_size": 4000, "max_position_embeddings": 512, "original_max_position_embeddings": 512}
    base = synthetic.save_tiny(tmp_path / "base", torch.bfloat16, **WIDE | changes)
    for lengths in ([[512]], [[64] * 4, [200]], [[3]]):  # attention with and without weights, and next to no rows
        for process in (0.0, None):  # on a CPU, and on a GPU
            size = Shape(lengths, sum(map(sum, lengths)))
            run = Setup(Phi3LoRAModule(base, **options), mixed=True, ranks=2, sharded=False, process=process)
            found = run.memory(size, "none")
            assert upper_bound(run.module, size) > found.total - found.base - found.process


def test_masks_over_rows_have_no_bound(wide):
    assert upper_bound(Phi3LoRAModule(wide, attn_implementation="eager"), SHAPE) == math.inf


def test_the_fastest_way_that_fits_is_taken(wide, remembered):
    run = setup(wide)
    most = upper_bound(run.module, SHAPE)
    assert fastest(run, SHAPE, most)[0] == "none"
    for way, leaner in (("none", 4), (4, "selective"), ("selective", "full")):
        assert fastest(run, SHAPE, needed(run, way))[0] == way
        assert fastest(run, SHAPE, needed(run, way) - 1)[0] == leaner
    way, why = fastest(run, SHAPE, needed(run, "full") - 1)
    assert way == "full"
    assert "may not fit" in why


def test_a_gpu_recomputes_by_layers(wide, remembered):
    run = Setup(Phi3LoRAModule(wide), mixed=True, ranks=1, sharded=False, process=None)
    for way, leaner in (("none", 4), (4, 2), (2, "full")):
        assert fastest(run, SHAPE, needed(run, way) - 1)[0] == leaner


@pytest.mark.slow
@pytest.mark.parametrize("way", ["none", "full"])
def test_one_more_row_would_not_fit(wide, remembered, way):
    run, row = setup(wide, gradient_checkpointing=way), Shape([[200, 60]], 256)
    for target in (1, 2, 9):
        room = run.memory(Shape(row.lengths * target, row.supervised * target)).total * 1.001
        assert most_rows(run, row, room) == (target, way)  # what is extrapolated is what a plan of them says


def test_the_way_of_auto_is_the_fastest_with_one_row(wide, remembered):
    run = setup(wide)
    assert most_rows(run, SHAPE, run.memory(SHAPE, "none").total)[1] == "none"
    rows, way = most_rows(run, SHAPE, run.memory(SHAPE, "none").total - 1)
    assert (rows >= 1, way) == (True, 4)
    with pytest.raises(ConfigError, match=r"data\.max_tokens_per_batch: auto finds no size .* one row of 160 tokens"):
        most_rows(run, SHAPE, run.memory(SHAPE, "full").total - 1)


# ---------------------------------------------------------------- in a run


def chats(tmp_path, **options) -> ChatDataModule:
    options = {"max_length": 256, "num_workers": 0, "val_fraction": 0.1, "batch_size": 2, "seed": 1} | options
    return ChatDataModule(
        str(TINY / "chats_train.jsonl"), tokenizer=str(TINY), cache_dir=str(tmp_path / "cache"), **options
    )


def test_a_run_takes_what_fits_and_says_so(tmp_path, memory, caplog):
    ways = {}
    for free in (10 * GB, 30 * 10**6):
        memory(free)
        caplog.clear()
        module = Phi3LoRAModule(str(TINY))
        with caplog.at_level("INFO"):
            synthetic.trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, chats(tmp_path))
        ways[free] = way_of(module.model)
        assert f"gradient checkpointing: {ways[free]}, since the largest batch takes" in caplog.text
    assert ways == {10 * GB: "none", 30 * 10**6: "full"}


def test_rows_that_nobody_knows_are_recomputed(tmp_path, tiny_base):
    module = Phi3LoRAModule(tiny_base)
    batch = synthetic.batch_of([[synthetic.document(9, 5, 0)]])
    synthetic.trainer(tmp_path, max_steps=1).fit(module, synthetic.loader([batch]))
    assert way_of(module.model) == "full"


def test_a_loaded_model_that_is_nowhere_on_the_disk_is_planned_as_well(tmp_path, memory):
    memory(10 * GB)
    model = Phi3LoRAModule(str(TINY))
    model.configure_model()
    base = model.detach_adapter()
    base.name_or_path = ""
    module = Phi3LoRAModule(base)
    synthetic.trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, chats(tmp_path))
    assert way_of(module.model) == "none"


def trained(tmp_path, **options) -> tuple[torch.Tensor, int, int]:
    """Weights after an epoch, its steps, and its micro-batches."""
    synthetic.pl.seed_everything(0, verbose=False)
    module = Phi3LoRAModule(str(TINY), lora={"lora_dropout": 0.0}, gradient_checkpointing="none")
    accumulate = options.pop("accumulate", 1)
    trainer = synthetic.trainer(tmp_path, accumulate_grad_batches=accumulate, limit_val_batches=0)
    trainer.fit(module, chats(tmp_path, **options))
    weights = torch.cat([parameter.detach().flatten() for parameter in module.trained_parameters()])
    return weights, trainer.global_step, trainer.num_training_batches


@pytest.mark.parametrize(("rows", "micro", "batches"), [(100, 1, 6), (2, 2, 2), (3, 2, 3), (1, 1, 6)])
def test_an_optimiser_step_keeps_its_rows(tmp_path, monkeypatch, rows, micro, batches):
    """Six rows to a step, by one after the other, or by as many together as fit."""
    monkeypatch.setattr(Phi3LoRAModule, "rows_that_fit", lambda self, row: rows)
    found, steps, count = trained(tmp_path, max_tokens_per_batch="auto", batch_size=2, accumulate=3)
    each = {100: 6, 2: 2, 3: 3, 1: 1}[rows]
    expected, *same = trained(tmp_path, max_tokens_per_batch=each * 256, accumulate=6 // each)
    assert [steps, count] == same
    assert torch.equal(found, expected)


def test_another_trainer_keeps_the_rows_of_a_step_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Phi3LoRAModule, "rows_that_fit", lambda self, row: 3)
    data = chats(tmp_path, max_tokens_per_batch="auto", batch_size=2)
    for _ in range(2):
        trainer = synthetic.trainer(tmp_path, accumulate_grad_batches=3, limit_val_batches=0, max_steps=1)
        trainer.fit(Phi3LoRAModule(str(TINY), gradient_checkpointing="none"), data)
        assert trainer.accumulate_grad_batches == 2
        assert len(data.largest_train_batch()["lengths"]) == 3


@pytest.mark.slow
def test_the_budget_follows_memory(tmp_path, memory, caplog):
    batches = []
    for total in (10 * GB, 1.4 * GB):
        memory(10 * GB, total)
        caplog.clear()
        with caplog.at_level("INFO"):
            *_, count = trained(tmp_path, max_tokens_per_batch="auto", batch_size=64)
        batches.append(count)
        assert "rows fit into 85% of" in caplog.text
        assert "to an optimiser step of 64 rows" in caplog.text
    assert batches[0] < batches[1]


def test_a_stream_s_rows_are_full(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Phi3LoRAModule, "rows_that_fit", lambda self, row: seen.append(row["lengths"]) or 3)
    data = chats(tmp_path, streaming=True, max_tokens_per_batch="auto", batch_size=3, val_fraction=0.0)
    module = Phi3LoRAModule(str(TINY), gradient_checkpointing="none")
    synthetic.trainer(tmp_path, max_steps=1, max_epochs=-1).fit(module, data)
    assert seen == [[[256]]]


def test_other_memory_within_an_epoch_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Phi3LoRAModule, "rows_that_fit", lambda self, row: 2)

    def fit(steps: int, checkpoint=None):
        module = Phi3LoRAModule(str(TINY), gradient_checkpointing="none")
        trainer = synthetic.trainer(tmp_path, max_steps=steps, limit_val_batches=0)
        trainer.fit(module, chats(tmp_path, max_tokens_per_batch="auto", batch_size=4), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")

    fit(1)
    fit(2, tmp_path / "last.ckpt")
    monkeypatch.setattr(Phi3LoRAModule, "rows_that_fit", lambda self, row: 4)
    with pytest.raises(CheckpointError, match="max_tokens_per_batch was 512, now 1024"):
        fit(3, tmp_path / "last.ckpt")


def test_a_module_that_does_not_know_its_memory_is_named(tmp_path):
    class Plain(synthetic.pl.LightningModule):
        def training_step(self, batch, batch_idx):
            raise AssertionError

        def configure_optimizers(self):
            return None

        validation_step = training_step

    with pytest.raises(ConfigError, match=r"data\.max_tokens_per_batch: auto asks the module .* Plain"):
        synthetic.trainer(tmp_path).fit(Plain(), chats(tmp_path, max_tokens_per_batch="auto"))


def test_elsewhere_the_batch_size_counts(tmp_path):
    data = chats(tmp_path, max_tokens_per_batch="auto", batch_size=2)
    data.prepare_data()
    data.setup("validate")
    assert {len(batch["lengths"]) for batch in data.val_dataloader()} == {2}
    with pytest.raises(ConfigError, match=r"data\.max_tokens_per_batch: 'most' is no number"):
        chats(tmp_path, max_tokens_per_batch="most")
