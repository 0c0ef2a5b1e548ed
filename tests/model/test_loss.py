"""The loss against transformers' own and against plain cross-entropy."""

import pytest
import torch
from torch import nn
from transformers import Phi3ForCausalLM

import synthetic
from phi3_lightning.batch import IGNORE_INDEX
from phi3_lightning.model import loss

DOCUMENTS = [synthetic.document(12, 5, 0), synthetic.document(30, 29, 1), synthetic.document(7, 1, 2)]
ROWS = [[document] for document in DOCUMENTS]
SUPERVISED = 5 + 29 + 1

# float32 sums of 35 token losses, each a log-sum of 97 exponentials
TOLERANCE = (SUPERVISED + synthetic.VOCABULARY) * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module", params=["frozen", "trained"])
def head(request) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, synthetic.VOCABULARY, bias=False).requires_grad_(request.param == "trained")


def hidden_of(batch) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(*batch["input_ids"].shape, 16, requires_grad=True)


def plain_loss(hidden, head, batch) -> torch.Tensor:
    """Full logits, shifted, summed."""
    logits, labels = head(hidden)[:, :-1], batch["labels"][:, 1:]
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def test_loss_is_that_of_transformers(tiny_base):
    model = Phi3ForCausalLM.from_pretrained(tiny_base)
    for ids, labels in DOCUMENTS:
        theirs = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), use_cache=False).loss
        batch = synthetic.batch_of([[(ids, labels)]])
        hidden = model.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
        total, count = loss.cross_entropy(hidden, model.lm_head, batch)
        assert (total / count).item() == pytest.approx(theirs.item(), rel=TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 7, SUPERVISED, 1024])
def test_chunks_change_neither_loss_nor_gradient(head, monkeypatch, chunk):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    batch = synthetic.batch_of(ROWS)
    hidden, reference = hidden_of(batch), hidden_of(batch)
    total, count = loss.cross_entropy(hidden, head, batch)
    expected = plain_loss(reference, head, batch)
    assert count.item() == SUPERVISED
    assert total.item() == pytest.approx(expected.item(), rel=TOLERANCE)
    gradient, expected_gradient = torch.autograd.grad(total, hidden)[0], torch.autograd.grad(expected, reference)[0]
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=TOLERANCE * expected_gradient.abs().max())


def test_full_logits_never_exist_at_once(head, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 4)
    seen = []
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    batch = synthetic.batch_of(ROWS)
    loss.cross_entropy(hidden_of(batch), head, batch)[0].backward()
    handle.remove()
    # a trained head computes its logits again for its own gradient
    assert len(seen) == -(-SUPERVISED // 4) * (2 if head.weight.requires_grad else 1)
    assert max(rows for rows, _ in seen) == 4


def test_position_t_predicts_token_t_plus_1(head):
    batch = synthetic.batch_of([[([5, 6, 7, 8], [IGNORE_INDEX, IGNORE_INDEX, 7, 8])]])
    hidden = hidden_of(batch)
    states, targets = loss.supervised_positions(hidden, batch)
    assert targets.tolist() == [7, 8]
    assert torch.equal(states, hidden[0, 1:3])


def test_a_label_never_crosses_from_one_document_to_the_next(head):
    first, second = synthetic.document(6, 5, 0), synthetic.document(6, 5, 1)
    packed = synthetic.batch_of([[first, second]])
    _, targets = loss.supervised_positions(hidden_of(packed), packed)
    assert targets.tolist() == first[0][1:] + second[0][1:]


def test_no_supervised_token_gives_zero_with_a_graph(head):
    batch = synthetic.batch_of([[([3, 4, 5], [IGNORE_INDEX] * 3)]])
    hidden = hidden_of(batch)
    total, count = loss.cross_entropy(hidden, head, batch)
    assert (total.item(), count.item()) == (0, 0)
    total.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_sums_are_float32_over_a_bfloat16_head(head):
    batch = synthetic.batch_of(ROWS)
    half = nn.Linear(16, synthetic.VOCABULARY, bias=False).to(torch.bfloat16)
    hidden = hidden_of(batch).detach().to(torch.bfloat16)
    total, _ = loss.cross_entropy(hidden, half, batch)
    states, targets = loss.supervised_positions(hidden, batch)
    exact = nn.functional.cross_entropy(half(states).double(), targets, reduction="sum").item()
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact, rel=TOLERANCE)
    assert abs(total.bfloat16().item() - exact) > 10 * TOLERANCE * exact  # the same sum rounded to bfloat16


def test_correct_tokens_are_counted_at_supervised_positions_only(head):
    batch = synthetic.batch_of(ROWS)
    hidden = hidden_of(batch)
    predicted = head(hidden).argmax(-1)
    expected = sum(
        (predicted[row, position - 1] == batch["labels"][row, position]).item()
        for row in range(len(ROWS))
        for position in range(1, batch["labels"].shape[1])
        if batch["labels"][row, position] != IGNORE_INDEX
    )
    assert [number.item() for number in loss.correct_tokens(hidden, head, batch)] == [expected, SUPERVISED]
    batch["labels"][1, 1:30] = predicted[1, :29]  # now all 29 of the second row are correct
    correct, _ = loss.correct_tokens(hidden, head, batch)
    assert correct.item() >= 29


def test_the_gradient_of_a_trained_head_is_right(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 7)
    torch.manual_seed(0)
    head = nn.Linear(16, synthetic.VOCABULARY, bias=False)
    batch = synthetic.batch_of(ROWS)
    (found,) = torch.autograd.grad(loss.cross_entropy(hidden_of(batch), head, batch)[0], head.weight)
    (expected,) = torch.autograd.grad(plain_loss(hidden_of(batch), head, batch), head.weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * expected.abs().max())


def test_each_document_has_its_own_loss(head, monkeypatch):
    """Packed and padded rows, in chunks that end within documents, against each document alone."""
    monkeypatch.setattr(loss, "CHUNK", 7)
    silent = ([5, 6, 7], [IGNORE_INDEX] * 3)
    batch = synthetic.batch_of([[DOCUMENTS[0], silent, DOCUMENTS[1]], [DOCUMENTS[2]]])
    hidden = hidden_of(batch)
    found = loss.by_document(hidden, head, batch)
    assert found.shape == (4, 3)
    assert found[:, 2].tolist() == [5, 0, 29, 1]
    assert found[1].tolist() == [0, 0, 0]
    places = [(0, 0, DOCUMENTS[0]), (0, 15, DOCUMENTS[1]), (1, 0, DOCUMENTS[2])]
    for index, (row, start, document) in zip((0, 2, 3), places, strict=True):
        alone = synthetic.batch_of([[document]])
        states = hidden[row : row + 1, start : start + len(document[0])]
        assert found[index, 0].item() == pytest.approx(plain_loss(states, head, alone).item(), rel=TOLERANCE)
        assert found[index, 1].item() == loss.correct_tokens(states, head, alone)[0].item()
    assert found[:, 0].sum().item() == pytest.approx(loss.cross_entropy(hidden, head, batch)[0].item(), rel=TOLERANCE)


def test_the_losses_of_documents_have_the_gradient_of_each_times_its_factor(head, monkeypatch):
    """Packed and padded rows, in chunks that end within documents, with a document that has no label."""
    monkeypatch.setattr(loss, "CHUNK", 7)
    silent = ([5, 6, 7], [IGNORE_INDEX] * 3)
    batch = synthetic.batch_of([[DOCUMENTS[0], silent, DOCUMENTS[1]], [DOCUMENTS[2]]])
    factors = torch.tensor([0.3, 5.0, -2.0, 0.0])
    hidden, reference = hidden_of(batch), hidden_of(batch)
    losses, counts = loss.document_losses(hidden, head, batch)
    assert (losses.dtype, counts.tolist()) == (torch.float32, [5, 0, 29, 1])
    (losses * factors).sum().backward()
    places = [(0, slice(0, 12)), (0, slice(12, 15)), (0, slice(15, 45)), (1, slice(0, 7))]
    expected = []
    for (row, tokens), document in zip(places, [DOCUMENTS[0], silent, *DOCUMENTS[1:]], strict=True):
        expected.append(plain_loss(reference[row : row + 1, tokens], head, synthetic.batch_of([[document]])))
    expected = torch.stack(expected)
    (expected * factors).sum().backward()
    torch.testing.assert_close(losses, expected, rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(hidden.grad, reference.grad, rtol=0, atol=TOLERANCE * reference.grad.abs().max())
    assert not hidden.grad[1].any()  # of the document whose factor is 0


def test_losses_of_documents_add_up_to_that_of_all(head):
    batch = synthetic.batch_of(ROWS)
    losses, counts = loss.document_losses(hidden_of(batch), head, batch)
    total, count = loss.cross_entropy(hidden_of(batch), head, batch)
    assert losses.sum().item() == pytest.approx(total.item(), rel=TOLERANCE)
    assert counts.sum().item() == count.item()


def test_full_logits_of_documents_never_exist_at_once(head, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 4)
    seen = []
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    batch = synthetic.batch_of(ROWS)
    loss.document_losses(hidden_of(batch), head, batch)[0].sum().backward()
    handle.remove()
    assert len(seen) == -(-SUPERVISED // 4) * (2 if head.weight.requires_grad else 1)
    assert max(rows for rows, _ in seen) == 4


def test_factors_are_not_rounded_with_the_states():
    """In bfloat16 the factor would be 1: a token's gradient is rounded once, after the product."""
    factor = 1 + 3 * 2**-10
    torch.manual_seed(0)
    head = nn.Linear(16, synthetic.VOCABULARY, bias=False).bfloat16().requires_grad_(False)
    batch = synthetic.batch_of(ROWS)
    gradients = []
    for each in (1.0, factor):
        hidden = hidden_of(batch).detach().bfloat16().requires_grad_()
        (loss.document_losses(hidden, head, batch)[0] * each).sum().backward()
        gradients.append(hidden.grad.float())
    assert torch.equal((gradients[0] * factor).bfloat16().float(), gradients[1])
    assert not torch.equal(*gradients)


def test_a_filler_batch_has_no_document(head):
    batch = synthetic.batch_of([[([5, 5], [IGNORE_INDEX] * 2)]])
    batch["document_lengths"], batch["document_ids"] = [[]], [[]]
    assert loss.by_document(hidden_of(batch), head, batch).shape == (0, 3)
    hidden = hidden_of(batch)
    losses, counts = loss.document_losses(hidden, head, batch)
    assert losses.shape == counts.shape == (0,)
    losses.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
