"""The components of peak memory, and suggestions that reduce it."""

from dataclasses import replace

import pytest
import torch

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.errors import ModelError
from phi3_lightning.model.base import load
from phi3_lightning.planning import speed
from phi3_lightning.planning.memory import (
    FIRST_STEP_LIBRARY_BYTES,
    FRAGMENTATION_PER_ACTIVATION_BYTE,
    FRAGMENTATION_PER_PEAK_BYTE,
    MemoryPredictor,
)
from phi3_lightning.planning.speed import timed_seconds
from phi3_lightning.planning.step import BatchShape
from phi3_lightning.planning.suggestions import _changes, suggestions

SHAPE = BatchShape([[70, 30], [60]], 110)


def predictor(base: str, ranks: int = 1, sharded: bool = False, process: float | None = 0.0, **options):
    module = Phi3LoRAModule(base, **{"gradient_checkpointing": "none", **options})
    return MemoryPredictor(replace(module.spec(), mixed=True, ranks=ranks, sharded=sharded, process=process))


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_gradients_and_moments_are_those_of_a_real_run(tmp_path, tied):
    base = synthetic.save_tiny(tmp_path / "base", torch.bfloat16, tie_word_embeddings=tied)
    memory = predictor(base).memory(SHAPE)
    module = Phi3LoRAModule(base, gradient_checkpointing="none")
    synthetic.trainer(tmp_path, max_steps=1).fit(
        module, synthetic.loader([synthetic.batch_of([[synthetic.document(9, 5, 0)]])])
    )
    trained = list(module.trained_parameters())
    assert memory.base == size(p for p in module.parameters() if not p.requires_grad) + size(module.model.buffers())
    assert memory.adapter == 2 * size(trained)
    state = module.trainer.optimizers[0].state
    assert memory.optimizer == size(state[p][name] for p in trained for name in ("exp_avg", "exp_avg_sq"))


PAIRS = BatchShape([[60, 40, 30, 20], [50, 50]], 110, [[0, 25, 0, 9], [0, 30]])


def test_a_reference_that_is_a_copy_of_the_adapter_takes_its_bytes_once_more(tiny_base):
    fresh, copy = (
        predictor(tiny_base, objective={"name": "dpo"}, lora={"init_lora_weights": start}).memory(PAIRS)
        for start in (True, False)
    )
    assert copy.adapter == 1.5 * fresh.adapter
    orpo = predictor(tiny_base, objective={"name": "orpo"}, lora={"init_lora_weights": False}).memory(PAIRS)
    assert (orpo.adapter, orpo.reference) == (fresh.adapter, 0)
    four = predictor(tiny_base, ranks=4, sharded=True, objective={"name": "orpo"}).memory(PAIRS)
    assert four.reference == 0


def tried(run: MemoryPredictor, shape: BatchShape) -> dict:
    """The changes that are tried, with what predicts the memory of each."""
    return dict(_changes(run, shape, None))


def test_suggestions_for_pairs_bound_each_answer(tiny_base, monkeypatch):
    run = predictor(tiny_base, objective={"name": "simpo"})
    monkeypatch.setattr(MemoryPredictor, "memory", lambda self, shape, mode=None: shape)
    predictions = tried(run, PAIRS)
    # a row holds two conversations of data.max_length, which is 75 here
    halved = BatchShape([[30, 20, 15, 10], [25, 25]], 55, [[0, 12, 0, 4], [0, 15]])
    assert predictions["data.max_length: 37"]() == halved
    assert predictions["data.batch_size: 1"]() == BatchShape([[60, 40, 30, 20]], 66, [[0, 25, 0, 9]])


def test_kto_is_not_left_with_one_answer(tiny_base):
    run = predictor(tiny_base, objective={"name": "kto"})
    assert "data.batch_size: 1" in tried(run, SHAPE)
    assert "data.batch_size: 1" not in tried(run, BatchShape([[70], [60]], 110))


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
    assert predictor(base, quantization=kind).memory(SHAPE).base == pytest.approx(kept, rel=0.01)


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_vnni"), reason="this CPU has no AVX-512 VNNI")
def test_a_base_that_computes_in_8_bits_is_planned_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "TIMING_SECONDS", 1e-9)
    base = synthetic.save_tiny(tmp_path / "base", torch.bfloat16, hidden_size=64, intermediate_size=128)
    model = load(base, quantization="int8_dynamic")
    run = predictor(base, quantization="int8_dynamic")
    assert run.memory(SHAPE).base == size(model.parameters()) + size(model.buffers())
    assert run.memory(SHAPE).stored == predictor(base).memory(SHAPE).stored
    assert timed_seconds(run.spec, BatchShape([[64]], 32), device="cpu", peak=None) > 0
    with pytest.raises(ModelError, match="runs on a CPU"):
        predictor(base, quantization="int8_dynamic", process=None).memory(SHAPE)


def test_suggestions_are_sorted_and_each_helps(tiny_base):
    run = predictor(tiny_base)
    memory = run.memory(SHAPE)
    changed_options = []
    helpful = suggestions(run, SHAPE, memory, changed_options.append)
    totals = [suggestion.memory.total for suggestion in helpful]
    assert totals == sorted(totals)
    assert all(total < memory.total for total in totals)
    assert {suggestion.change for suggestion in helpful} <= set(changed_options)
    assert "model.gradient_checkpointing: full" in changed_options
    assert "data.batch_size: 1" in changed_options
    assert "data.max_length: 50" in changed_options
    assert "model.lora.r: 8" in changed_options


@pytest.mark.slow
def test_the_memory_of_a_suggestion_is_the_plan_of_a_run_with_it(tiny_base):
    run = predictor(tiny_base)
    found = changes(run)
    assert found["model.gradient_checkpointing: full"] == predictor(tiny_base, gradient_checkpointing="full").memory(
        SHAPE
    )
    assert found["model.lora.r: 8"] == predictor(tiny_base, lora={"r": 8}).memory(SHAPE)
    assert found["model.quantization: nf4"] == predictor(tiny_base, quantization="nf4").memory(SHAPE)
    assert found["FSDP2 over 8 devices"] == predictor(tiny_base, ranks=8, sharded=True).memory(SHAPE)
    # rows are cut in the middle, and the longest of them holds 100 of 160 tokens
    assert found["data.max_length: 50"] == run.memory(BatchShape([[50], [30]], 55))
    assert found["data.batch_size: 1"] == run.memory(BatchShape([[70, 30]], 68))


def test_an_fsdp2_rank_holds_its_shard_and_gathered_layers(tiny_base):
    one, four = predictor(tiny_base).memory(SHAPE), predictor(tiny_base, ranks=4, sharded=True).memory(SHAPE)
    assert (four.base, four.adapter, four.optimizer) == (one.base / 4, one.adapter / 4, one.optimizer / 4)
    model = Phi3LoRAModule(tiny_base)
    model.configure_model()
    layer, head = (size(p for p in part.parameters() if not p.requires_grad) for part in (
        model.model.model.layers[0], model.model.lm_head
    ))  # fmt: skip
    assert four.working == one.working + 3 * layer + head


def changes(run: MemoryPredictor) -> dict:
    """The suggestions, with their memory."""
    return {suggestion.change: suggestion.memory for suggestion in suggestions(run, SHAPE, run.memory(SHAPE))}


def test_unsupported_options_are_not_suggested(tiny_base):
    # FSDP2 has no DoRA, and orthogonal initialisation no odd rank
    run = predictor(tiny_base, lora={"r": 6, "init_lora_weights": "orthogonal", "use_dora": True})
    suggested = " ".join(changes(run))
    assert "data.batch_size: 1" in suggested
    assert "FSDP2" not in suggested
    assert "model.lora.r" not in suggested


def test_ddp_adds_gradient_buckets(tiny_base):
    one, two = predictor(tiny_base).memory(SHAPE), predictor(tiny_base, ranks=2).memory(SHAPE)
    assert two.adapter == 1.5 * one.adapter
    assert replace(two, adapter=one.adapter) == one


def test_the_time_of_a_step_is_extrapolated_from_shallow_models(tmp_path, monkeypatch):
    """By a clock that the test moves: a second for the head, and half a second for each layer."""
    now = [0.0]

    def step(model, adapter, spec, shape, **_):
        again = model.model.layers[0].gradient_checkpointing
        now[0] += 1 + (0.75 if again else 0.5) * model.config.num_hidden_layers

    monkeypatch.setattr(speed, "take_step", step)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    base = synthetic.save_tiny(tmp_path / "base", torch.bfloat16, num_hidden_layers=12)

    def timed(mode, peak=None) -> float:
        return timed_seconds(predictor(base, gradient_checkpointing=mode).spec, SHAPE, device="cpu", peak=peak)

    assert timed("none") == pytest.approx(7)
    assert timed("full") == timed("offload") == pytest.approx(10)
    assert timed(3) == pytest.approx(7 + (10 - 7) / 3)  # every third layer
    # a slow device is timed on the fewest tokens, and the time per token is the same for more
    assert timed("none", peak=1.0) == pytest.approx(7 * SHAPE.tokens / speed.MIN_TIMED_TOKENS)


def test_whole_pairs_are_timed_or_one_that_is_made_shorter():
    assert speed._first_pairs(PAIRS, 120) == BatchShape([[60, 40]], 44, [[0, 25]])
    assert speed._first_pairs(PAIRS, 150) == BatchShape([[60, 40, 30, 20]], 66, [[0, 25, 0, 9]])
    assert speed._first_pairs(PAIRS, 50) == BatchShape([[30, 20]], 22, [[0, 12]])
    assert speed._first_pairs(PAIRS, 2) == BatchShape([[2, 2]], 1, [[0, 0]])


@pytest.mark.slow
def test_a_gpu_has_larger_head_chunks_and_no_fragmentation(tiny_base):
    cpu, gpu = predictor(tiny_base), predictor(tiny_base, process=None)
    for supervised, times in ((100, 1), (512, 2), (5000, 4)):
        size = BatchShape([[250] * 20], supervised)
        on_cpu, on_gpu = cpu.memory(size), gpu.memory(size)
        assert on_gpu.head == pytest.approx(times * on_cpu.head)
        assert (on_gpu.layer, on_gpu.fragmentation) == (on_cpu.layer, 0)
        # attention on a GPU saves no probabilities: of two blocks of 125 queries, 4 heads and 2 layers, in bfloat16
        assert on_cpu.stored - on_gpu.stored == 20 * (125 * 125 + 125 * 250) * 4 * 2 * 2


def test_fragmentation_grows_with_live_memory_and_recomputation(tiny_base):
    run = predictor(tiny_base)
    none, full = (run.memory(SHAPE, mode) for mode in ("none", "full"))
    alive = none.stored + none.working
    of_peak, of_all = FRAGMENTATION_PER_PEAK_BYTE, FRAGMENTATION_PER_ACTIVATION_BYTE
    assert none.fragmentation == pytest.approx(FIRST_STEP_LIBRARY_BYTES + (of_peak + of_all) * alive)
    peak = full.stored + full.working
    assert full.fragmentation == pytest.approx(FIRST_STEP_LIBRARY_BYTES + of_peak * peak + of_all * alive)


@pytest.mark.slow
def test_the_mode_of_a_suggestion_is_that_of_a_run_with_it(tiny_base):
    run = predictor(tiny_base)
    found = changes(run)
    for mode in (2, "selective", "full"):
        of_run = predictor(tiny_base, gradient_checkpointing=mode).memory(SHAPE)
        assert found[f"model.gradient_checkpointing: {mode}"] == of_run
    for mode in ("full", "offload"):
        changed_options = []
        leaner = predictor(tiny_base, gradient_checkpointing=mode)
        suggestions(leaner, SHAPE, leaner.memory(SHAPE), changed_options.append)
        assert not any("gradient_checkpointing" in change for change in changed_options)
