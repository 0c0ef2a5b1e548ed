"""Packed rows give what single rows give, and a document never depends on its neighbour."""

import pytest
import torch

import synthetic
from phi3_lightning import Phi3LoRAModule

DOCUMENTS = [synthetic.document(length, length - 3, seed) for seed, length in enumerate([9, 30, 5, 17])]


@pytest.fixture(scope="module", params=["documents", "sdpa", "eager"])
def module(request, tmp_path_factory) -> Phi3LoRAModule:
    base = synthetic.save_tiny(tmp_path_factory.mktemp("packing") / "base", sliding_window=12)
    module = Phi3LoRAModule(
        base,
        dtype="float32",
        attn_implementation=request.param,
        lora={"lora_dropout": 0.0},
        gradient_checkpointing="none",
    )
    module.configure_model()
    for parameter in module.trained_parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return module


# float32 products of up to 64 terms in another order, through two layers of a residual stream of size about 1
TOLERANCE = 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("training", [True, False])
def test_packed_hidden_states_equal_single_ones(module, training):
    module.train(training)
    packed = module(synthetic.batch_of([DOCUMENTS]))[0]
    start = 0
    for ids, labels in DOCUMENTS:
        alone = module(synthetic.batch_of([[(ids, labels)]]))[0]
        torch.testing.assert_close(packed[start : start + len(ids)], alone, rtol=0, atol=TOLERANCE * 10)
        start += len(ids)


@pytest.mark.parametrize("training", [True, False])
def test_packed_loss_and_gradient_equal_padded_ones(module, training):
    module.train(training)
    results = []
    for rows in ([DOCUMENTS], [[document] for document in DOCUMENTS], [DOCUMENTS[:2], DOCUMENTS[2:]]):
        batch = synthetic.batch_of(rows)
        loss_sum, count = module.compute_loss(module(batch), module.head, batch)
        gradient = torch.autograd.grad(loss_sum / count, list(module.trained_parameters()))
        results.append((loss_sum.item(), count.item(), torch.cat([g.flatten() for g in gradient])))
    for loss_sum, count, gradient in results[1:]:
        assert count == results[0][1]
        assert loss_sum == pytest.approx(results[0][0], rel=TOLERANCE)
        assert (gradient - results[0][2]).abs().max() <= TOLERANCE * results[0][2].abs().max() * 10


@pytest.mark.parametrize("training", [True, False])
def test_second_document_does_not_depend_on_the_first(module, training):
    module.train(training)
    other_first = synthetic.document(9, 6, 99)
    with torch.no_grad():
        before = module(synthetic.batch_of([DOCUMENTS]))[0]
        after = module(synthetic.batch_of([[other_first, *DOCUMENTS[1:]]]))[0]
    assert torch.equal(before[9:], after[9:])
    assert not torch.equal(before[:9], after[:9])


def test_one_long_document_would_leak(module):
    batch = synthetic.batch_of([DOCUMENTS])
    with torch.no_grad():
        before = module(batch)[0]
        tokens = batch["input_ids"].shape[1]
        batch["position_ids"], batch["document_lengths"] = torch.arange(tokens)[None], [[tokens]]
        after = module(batch)[0]
    assert (before[9:] - after[9:]).abs().max() > 1000 * TOLERANCE


def test_pad_value_moves_nothing_and_a_supervised_token_does(module):
    module.eval()
    rows = [[document] for document in DOCUMENTS]

    def loss_of(batch) -> float:
        with torch.no_grad():
            return module.compute_loss(module(batch), module.head, batch)[0].item()

    plain = loss_of(synthetic.batch_of(rows, pad=0))
    assert loss_of(synthetic.batch_of(rows, pad=2)) == plain
    changed = synthetic.batch_of(rows)
    changed["input_ids"][1, 20] = changed["labels"][1, 20] = 3 + (changed["input_ids"][1, 20] - 2) % 90
    assert loss_of(changed) != plain
