"""The parts of the peak, and what would make it smaller."""

from dataclasses import replace

import pytest
import torch

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.model.base import load
from phi3_lightning.planning import speed
from phi3_lightning.planning.levers import levers
from phi3_lightning.planning.memory import HOLES, HOLES_OF_ALL, LOADED, Setup, resident
from phi3_lightning.planning.speed import timed_seconds
from phi3_lightning.planning.step import Shape

SHAPE = Shape([[70, 30], [60]], 110)


def setup(base: str, ranks: int = 1, sharded: bool = False, **options) -> Setup:
    module = Phi3LoRAModule(base, **{"gradient_checkpointing": "none", **options})
    return Setup(module, mixed=True, ranks=ranks, sharded=sharded, process=0.0)


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_gradients_and_moments_are_those_of_a_real_run(tmp_path, tied):
    base = synthetic.save_tiny(tmp_path / "base", torch.bfloat16, tie_word_embeddings=tied)
    memory = setup(base).memory(SHAPE)
    module = Phi3LoRAModule(base, gradient_checkpointing="none")
    synthetic.trainer(tmp_path, max_steps=1).fit(
        module, synthetic.loader([synthetic.batch_of([[synthetic.document(9, 5, 0)]])])
    )
    trained = list(module.trained_parameters())
    assert memory.base == size(p for p in module.parameters() if not p.requires_grad) + size(module.model.buffers())
    assert memory.adapter == 2 * size(trained)
    state = module.trainer.optimizers[0].state
    assert memory.optimizer == size(state[p][name] for p in trained for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_has_the_bytes_of_bitsandbytes(tmp_path, kind):
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 256, "intermediate_size": 512}
    base = synthetic.save_tiny(tmp_path / "base", torch.bfloat16, **wide)
    model = load(base, quantization=kind)
    kept = size(model.parameters()) + size(model.buffers())
    for layer in model.modules():
        if hasattr(getattr(layer, "weight", None), "quant_state"):
            state = layer.weight.quant_state
            kept += size([state.absmax, state.state2.absmax])
        elif getattr(getattr(layer, "weight", None), "SCB", None) is not None:
            kept += size([layer.weight.SCB])
    assert setup(base, quantization=kind).memory(SHAPE).base == pytest.approx(kept, rel=0.01)


def test_levers_are_sorted_and_each_helps(tiny_base):
    run = setup(tiny_base)
    memory = run.memory(SHAPE)
    told = []
    found = levers(run, SHAPE, memory, told.append)
    totals = [lever.memory.total for lever in found]
    assert totals == sorted(totals)
    assert all(total < memory.total for total in totals)
    assert {lever.change for lever in found} <= set(told)
    assert "model.gradient_checkpointing: full" in told
    assert "data.batch_size: 1" in told
    assert "data.max_length: 50" in told
    assert "model.lora.r: 8" in told


def test_a_lever_s_figure_is_the_plan_of_the_run_with_it(tiny_base):
    run = setup(tiny_base)
    found = {lever.change: lever.memory for lever in levers(run, SHAPE, run.memory(SHAPE), lambda change: None)}
    assert found["model.gradient_checkpointing: full"] == setup(tiny_base, gradient_checkpointing="full").memory(SHAPE)
    assert found["model.lora.r: 8"] == setup(tiny_base, lora={"r": 8}).memory(SHAPE)
    assert found["model.quantization: nf4"] == setup(tiny_base, quantization="nf4").memory(SHAPE)
    assert found["FSDP2 over 8 devices"] == setup(tiny_base, ranks=8, sharded=True).memory(SHAPE)
    # rows are cut in the middle, and the longest of them holds 100 of 160 tokens
    assert found["data.max_length: 50"] == run.memory(Shape([[50], [30]], 55))
    assert found["data.batch_size: 1"] == run.memory(Shape([[70, 30]], 68))


def test_a_rank_of_fsdp2_holds_its_share_and_gathers_the_rest_for_a_time(tiny_base):
    one, four = setup(tiny_base).memory(SHAPE), setup(tiny_base, ranks=4, sharded=True).memory(SHAPE)
    assert (four.base, four.adapter, four.optimizer) == (one.base / 4, one.adapter / 4, one.optimizer / 4)
    model = Phi3LoRAModule(tiny_base)
    model.configure_model()
    layer, head = (size(p for p in part.parameters() if not p.requires_grad) for part in (
        model.model.model.layers[0], model.model.lm_head
    ))  # fmt: skip
    assert four.working == one.working + 3 * layer + head


def test_what_fsdp2_refuses_is_no_lever(tiny_base):
    run = setup(tiny_base, lora={"use_dora": True})
    assert not any("FSDP2" in lever.change for lever in levers(run, SHAPE, run.memory(SHAPE), lambda change: None))


def test_several_devices_without_shards_have_buckets(tiny_base):
    one, two = setup(tiny_base).memory(SHAPE), setup(tiny_base, ranks=2).memory(SHAPE)
    assert two.adapter == 1.5 * one.adapter
    assert replace(two, adapter=one.adapter) == one


def test_the_time_of_a_step_follows_from_shallow_ones(tiny_base, monkeypatch):
    """By a clock that the test moves: a second for the head, and half a second for each layer."""
    now = [0.0]

    def step(module, shape, **_):
        now[0] += 1 + 0.5 * module.loaded_model.config.num_hidden_layers

    monkeypatch.setattr(speed, "take_step", step)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    module = Phi3LoRAModule(tiny_base)
    options = {"mixed": True, "device": "cpu"}
    assert timed_seconds(module, "none", 12, SHAPE, peak=None, **options) == pytest.approx(7)
    # a slow device is timed on the fewest tokens, and the others take as long each
    slow = timed_seconds(module, "none", 12, SHAPE, peak=1.0, **options)
    assert slow == pytest.approx(7 * SHAPE.tokens / speed.FEWEST)


def test_the_process_has_a_size():
    assert 1e8 < resident() < 1e11


def test_a_gpu_s_head_takes_larger_chunks_and_its_allocator_keeps_no_holes(tiny_base):
    run = setup(tiny_base)
    for supervised, times in ((100, 1), (512, 2), (5000, 4)):
        size = Shape([[250] * 20], supervised)
        on_cpu, on_gpu = run.memory(size), replace(run, process=None).memory(size)
        assert on_gpu.head == pytest.approx(times * on_cpu.head)
        assert (on_gpu.kept, on_gpu.layer, on_gpu.holes) == (on_cpu.kept, on_cpu.layer, 0)


def test_holes_grow_with_what_is_alive_and_with_what_is_recomputed(tiny_base):
    run = setup(tiny_base)
    none, full = (run.memory(SHAPE, way) for way in ("none", "full"))
    alive = none.kept + none.working
    assert none.holes == pytest.approx(LOADED + (HOLES + HOLES_OF_ALL) * alive)
    assert full.holes == pytest.approx(LOADED + HOLES * (full.kept + full.working) + HOLES_OF_ALL * alive)


def test_a_lever_s_way_is_that_of_a_run_with_it(tiny_base):
    run = setup(tiny_base)
    found = {lever.change: lever.memory for lever in levers(run, SHAPE, run.memory(SHAPE), lambda change: None)}
    for way in (2, "selective", "full"):
        assert found[f"model.gradient_checkpointing: {way}"] == setup(tiny_base, gradient_checkpointing=way).memory(
            SHAPE
        )
    for way in ("full", "offload"):
        told = []
        leaner = setup(tiny_base, gradient_checkpointing=way)
        levers(leaner, SHAPE, leaner.memory(SHAPE), told.append)
        assert not any("gradient_checkpointing" in change for change in told)
