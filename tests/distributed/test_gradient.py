"""A window has the same gradient, and ten steps the same result, on one process, on DDP and on FSDP2 ranks."""

import pytest
import torch
from torch import nn

import synthetic
from phi3_lightning import Phi3LoRAModule

from . import cases, ranks
from .cases import DOCUMENTS, EMPTY, EPSILON, SUPERVISED

TOLERANCE = sum(SUPERVISED) * EPSILON
"""Sums of 688 token gradients in another order: a rounding of float32 (1.2e-7) each, so 688 of them at most,
relative to the largest entry."""

STRATEGIES = {"ddp": "ddp", "fsdp2": {}, "fsdp2, kept after forward": {"reshard_after_forward": False},
              "fsdp2, offloaded": {"cpu_offload": True}}  # fmt: skip
ALL = synthetic.batch_of([[d] for d in DOCUMENTS])
HALVES = [synthetic.batch_of([[d] for d in DOCUMENTS[i::2]]) for i in range(2)]
PACKED = [synthetic.batch_of([DOCUMENTS[:1], DOCUMENTS[2:]]), synthetic.batch_of([DOCUMENTS[1:2]])]


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory) -> tuple[torch.Tensor, float]:
    """The gradient of (sum of losses) / (number of tokens), by transformers and autograd alone."""
    module = cases.module(base, gradient_checkpointing="none")
    module.configure_model()
    module.give_values()
    total = sum(
        module.model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), use_cache=False).loss * count
        for (ids, labels), count in zip(DOCUMENTS, SUPERVISED, strict=True)
    ) / sum(SUPERVISED)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(module.trained_parameters()))])
    return gradient, total.item()


def check(found: dict, reference: tuple[torch.Tensor, float], step: int = 0) -> None:
    gradient, loss = reference
    assert (found["gradients"][step] - gradient).abs().max() <= TOLERANCE * gradient.abs().max()
    assert found["losses"][step] == pytest.approx(loss, rel=TOLERANCE)
    assert found["norms"][step] == pytest.approx(gradient.norm().item(), rel=TOLERANCE)


@pytest.mark.parametrize(("batches", "accumulate"), [([ALL], 1), ([synthetic.batch_of([[d]]) for d in DOCUMENTS], 8)])
def test_one_process_has_the_reference_gradient(base, tmp_path, reference, batches, accumulate):
    check(cases.fit(tmp_path, base, batches, accumulate_grad_batches=accumulate), reference)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_of_four_rows_have_the_reference_gradient(base, tmp_path, reference, strategy):
    for found in ranks.run(tmp_path, 2, cases.fit, tmp_path, base, HALVES, STRATEGIES[strategy], 2):
        check(found, reference)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_packing_accumulation_and_an_empty_rank_keep_the_gradient(base, tmp_path, reference, strategy, checkpointing):
    batches = [*PACKED, EMPTY, EMPTY]  # two micro-batches on each of two ranks, the second of them empty on both
    alone = [ALL, EMPTY]  # all tokens on rank 0
    model = {"gradient_checkpointing": checkpointing}

    def run():
        window = cases.fit(tmp_path, base, batches, STRATEGIES[strategy], 2, model=model, accumulate_grad_batches=2)
        return window, cases.fit(tmp_path, base, alone, STRATEGIES[strategy], 2, model=model)

    for window, one_sided in ranks.run(tmp_path, 2, run):
        check(window, reference)
        check(one_sided, reference)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_three_ranks_with_a_short_last_window_keep_the_gradient(base, tmp_path, reference, strategy):
    # windows of two micro-batches a rank: all eight rows in the first, the last has one micro-batch, all eight again
    thirds = [synthetic.batch_of([[d] for d in DOCUMENTS[i::6]]) for i in range(6)]
    last = [synthetic.batch_of([[d] for d in DOCUMENTS[i::3]]) for i in range(3)]
    model = {"optimizer": {"lr": 1e-12}}  # the weights stay unchanged to within the tolerance

    def run():
        return cases.fit(tmp_path, base, thirds + last, STRATEGIES[strategy], 3, model=model, accumulate_grad_batches=2)

    for found in ranks.run(tmp_path, 3, run):
        check(found, reference)
        check(found, reference, step=1)


def test_negative_control_a_mean_of_rank_means_is_another_gradient(base, tmp_path, reference, monkeypatch):
    mean = lambda self, total, count, rows: total / torch.as_tensor(count).clamp(min=1)  # noqa: E731
    monkeypatch.setattr(Phi3LoRAModule, "weighted_mean", mean)
    monkeypatch.setattr(Phi3LoRAModule, "_warn_unweighted", lambda self: None)
    found = ranks.run(tmp_path, 2, cases.fit, tmp_path, base, HALVES, "ddp", 2)[0]
    assert (found["gradients"][0] - reference[0]).abs().max() > 100 * TOLERANCE * reference[0].abs().max()


CLIP = 0.05
"""About a quarter of the gradient's norm here."""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_clipping_takes_the_norm_over_all_ranks(base, tmp_path, reference, strategy):
    expected = reference[0].norm()
    assert expected > 2 * CLIP

    def run(clip):
        return cases.fit(tmp_path, base, HALVES, STRATEGIES[strategy], 2, kind=cases.Sgd, gradient_clip_val=clip)[
            "weights"
        ]

    clipped = ranks.run(tmp_path, 2, run, CLIP)[0]
    start = cases.module(base)
    start.configure_model()
    start.give_values()
    before = nn.utils.parameters_to_vector(start.trained_parameters()).detach()
    step = before - 0.1 * reference[0] * (CLIP / (expected + 1e-6))  # as clip_grad_norm_ clips
    assert (clipped - step).abs().max() <= 0.1 * CLIP * TOLERANCE + EPSILON * before.abs().max()


STEPS = 10
SHORT = [document for document, count in zip(DOCUMENTS, SUPERVISED, strict=True) if count < 100]
SHORT_TOLERANCE = sum(count for count in SUPERVISED if count < 100) * EPSILON


def train(base: str, folder, strategy, world: int, kind: type) -> dict:
    """Train one window per step: all rows on one process, or half of them on each of two ranks."""
    batches = [synthetic.batch_of([[d] for d in SHORT[rank::world]]) for rank in range(world)]
    return cases.fit(folder, base, batches * STEPS, strategy, world, kind=kind)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ten_steps_equal_those_of_one_process(base, tmp_path, strategy):
    """Weights agree under SGD; losses agree under AdamW, which divides by gradients that may be near 0."""
    kinds = (cases.Sgd, Phi3LoRAModule)
    alone = [train(base, tmp_path, "auto", 1, kind) for kind in kinds]
    both = ranks.run(tmp_path, 2, lambda: [train(base, tmp_path, STRATEGIES[strategy], 2, kind) for kind in kinds])
    for sgd, adamw in both:
        # each step adds the gradient's error, and the next gradient is taken where the last step ended:
        # with lr x curvature below 1 errors at most double in all
        largest = max(gradient.abs().max() for gradient in alone[0]["gradients"])
        bound = 2 * STEPS * 0.1 * SHORT_TOLERANCE * largest + STEPS * EPSILON * alone[0]["weights"].abs().max()
        assert (sgd["weights"] - alone[0]["weights"]).abs().max() <= bound
        assert adamw["losses"] == pytest.approx(alone[1]["losses"], rel=2 * STEPS * SHORT_TOLERANCE)
        assert alone[1]["losses"][-1] < alone[1]["losses"][0] - 0.01  # the steps do change the loss
    assert torch.equal(both[0][0]["weights"], both[1][0]["weights"])
