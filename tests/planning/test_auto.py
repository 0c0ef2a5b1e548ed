"""``auto`` options are chosen so that the predicted memory fits."""

import math
from dataclasses import replace

import pytest
import torch

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.errors import ConfigError
from phi3_lightning.planning.auto import (
    MAX_VALIDATION_TOKENS,
    fastest_mode,
    rows_that_fit,
    share_step,
    tokens_that_validate,
    upper_bound,
)
from phi3_lightning.planning.memory import CPU_PROCESS_BYTES, MemoryPredictor
from phi3_lightning.planning.spec import RunSpec
from phi3_lightning.planning.step import BatchShape

WIDE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 8, "vocab_size": 500}
SHAPE = BatchShape([[70, 30], [60]], 110)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> str:
    return synthetic.save_tiny(tmp_path_factory.mktemp("wide") / "base", torch.bfloat16, **WIDE)


@pytest.fixture
def cached_predictions(monkeypatch) -> None:
    """Cache predictions."""
    predict, predictions = MemoryPredictor.memory, {}

    def memory(self, shape, mode=None):
        key = str((shape, mode or self.spec.mode, self.spec.process))
        if key not in predictions:
            predictions[key] = predict(self, shape, mode)
        return predictions[key]

    monkeypatch.setattr(MemoryPredictor, "memory", memory)


def spec(base: str, ranks: int = 1, process: float | None = CPU_PROCESS_BYTES, **options) -> RunSpec:
    return replace(Phi3LoRAModule(base, **options).spec(), mixed=True, ranks=ranks, process=process)


def needed(run: MemoryPredictor, mode, shape: BatchShape = SHAPE) -> float:
    """The memory of a micro-batch without its base and its process."""
    memory = run.memory(shape, mode)
    return memory.total - memory.base - memory.process


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "float32"}, {"lora": {"backend": "loralib", "r": 64}}, {"lora": {"use_dora": True, "r": 2}},
     {"lora": {"modules_to_save": ["embed_tokens", "lm_head"]}}, {"lora": {"rank_pattern": {"down_proj": 200}}}],
    ids=["bfloat16", "float32", "loralib", "dora", "whole", "ranks"],
)  # fmt: skip
def test_the_bound_is_above_every_plan(tmp_path, options):
    lengths = {"max_position_embeddings": 512, "original_max_position_embeddings": 512}
    shallow = WIDE | lengths | {"num_hidden_layers": 2, "vocab_size": 4000}
    base = synthetic.save_tiny(tmp_path / "base", torch.bfloat16, **shallow)
    for lengths in ([[512]], [[64] * 4, [200]], [[3]]):  # attention with and without weights, and next to no rows
        shape = BatchShape(lengths, sum(map(sum, lengths)))
        on_cpu, on_gpu = (MemoryPredictor(spec(base, ranks=2, process=process, **options)) for process in (0.0, None))
        on_gpu.fake = on_cpu.fake
        for run in (on_cpu, on_gpu):
            assert upper_bound(run.spec, shape) > needed(run, "none", shape)


@pytest.mark.parametrize("start", [True, False])
def test_the_bound_is_above_every_plan_of_pairs(tmp_path, start):
    limits = {"max_position_embeddings": 2048, "original_max_position_embeddings": 2048}
    base = synthetic.save_tiny(tmp_path / "base", torch.bfloat16, **WIDE | limits)
    run = MemoryPredictor(spec(base, objective={"name": "dpo"}, lora={"init_lora_weights": start, "r": 2}))
    for prompt, answer in ((0, 512), (100, 100), (2000, 48), (1, 2)):  # with weights of attention, and without
        length = prompt + answer
        shape = BatchShape([[length, length]], 2 * answer, [[0, prompt]])
        assert upper_bound(run.spec, shape) > needed(run, "none", shape)


def test_attention_with_a_mask_has_no_upper_bound(wide):
    assert upper_bound(spec(wide, attn_implementation="eager"), SHAPE) == math.inf


def test_the_fastest_mode_that_fits_is_taken(wide, cached_predictions):
    run = MemoryPredictor(spec(wide))
    assert fastest_mode(run, SHAPE, upper_bound(run.spec, SHAPE))[0] == "none"
    for mode, leaner in (("none", 4), (4, "selective"), ("selective", "full")):
        assert fastest_mode(run, SHAPE, needed(run, mode))[0] == mode
        assert fastest_mode(run, SHAPE, needed(run, mode) - 1)[0] == leaner
    mode, why = fastest_mode(run, SHAPE, needed(run, "full") - 1)
    assert mode == "full"
    assert "may not fit" in why


def test_on_a_gpu_every_n_layers_are_recomputed(wide, cached_predictions):
    run = MemoryPredictor(spec(wide, process=None))
    for mode, leaner in (("none", 4), (4, 2), (2, "full")):
        assert fastest_mode(run, SHAPE, needed(run, mode) - 1)[0] == leaner


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full"])
def test_rows_that_fit_is_the_largest_number_that_fits(wide, cached_predictions, mode):
    run, row = spec(wide, gradient_checkpointing=mode), BatchShape([[200, 60]], 256)
    for target in (1, 2, 9):
        rows = BatchShape(row.lengths * target, row.supervised * target)
        room = CPU_PROCESS_BYTES + (MemoryPredictor(run).memory(rows).total - CPU_PROCESS_BYTES) * 1.001
        assert rows_that_fit(run, row, room) == (target, mode)  # the extrapolation equals a plan of these rows


@pytest.mark.slow
def test_auto_chooses_the_fastest_mode_for_one_row(wide, cached_predictions):
    run = spec(wide)
    none, full = (MemoryPredictor(run).memory(SHAPE, mode).total for mode in ("none", "full"))
    assert rows_that_fit(run, SHAPE, none)[1] == "none"
    rows, mode = rows_that_fit(run, SHAPE, none - 1)
    assert (rows >= 1, mode) == (True, 4)
    with pytest.raises(ConfigError, match=r"data\.max_tokens_per_batch: auto finds no size .* one row of 160 tokens"):
        rows_that_fit(run, SHAPE, full - 1)


def test_memory_held_by_the_process_does_not_change_the_rows(wide, cached_predictions):
    room = MemoryPredictor(spec(wide)).memory(SHAPE, "none").total
    assert len({rows_that_fit(spec(wide, process=process), SHAPE, room) for process in (0.0, 3e9)}) == 1


@pytest.mark.slow
def test_tokens_that_validate_are_the_most_that_fit(wide):
    run, row = spec(wide), BatchShape([[200, 60]], 256)
    for target in (1, 9):
        room = MemoryPredictor(run).validation_memory(row.times(target)).total
        assert tokens_that_validate(run, row, room + 1) == target * row.tokens
    assert rows_that_fit(run, row, room)[0] < 9  # training keeps more
    assert tokens_that_validate(run, row, 1e12) == MAX_VALIDATION_TOKENS


@pytest.mark.parametrize(
    ("rows", "fitting", "shares"), [(6, 100, (1, 6)), (6, 4, (2, 3)), (7, 3, (3, 3)), (5, 1, (5, 1))]
)
def test_a_step_is_split_into_few_micro_batches_of_equal_size(rows, fitting, shares):
    assert share_step(rows, fitting) == shares
