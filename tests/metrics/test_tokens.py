"""Metrics are weighted by tokens: neither batches nor ranks change them."""

import math

import pytest
import torch
from torch import nn
from torchmetrics.text import Perplexity as TorchmetricsPerplexity

from phi3_lightning.batch import IGNORE_INDEX
from phi3_lightning.metrics import Perplexity, TokenMean, TokenMetrics

TOKENS = [1, 40, 3, 7, 25, 2, 11]


@pytest.fixture(scope="module")
def rows() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits and targets of seven uneven rows."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(count, 50, generator=generator) * count, torch.randint(50, (count,), generator=generator))
        for count in TOKENS
    ]


def measured(rows, batch_size: int) -> TokenMetrics:
    metrics = TokenMetrics()
    for start in range(0, len(rows), batch_size):
        logits, targets = map(torch.cat, zip(*rows[start : start + batch_size], strict=True))
        count = torch.tensor(len(targets))
        loss_sum = nn.functional.cross_entropy(logits, targets, reduction="sum")
        metrics.update(loss_sum, count, (logits.argmax(-1) == targets).sum(), count)
    return metrics


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_metrics_are_those_of_all_tokens_at_once(rows, batch_size):
    metrics = measured(rows, batch_size)
    logits, targets = map(torch.cat, zip(*rows, strict=True))
    # float32 sums of at most 89 terms, which are added in float64
    tolerance = sum(TOKENS) * torch.finfo(torch.float32).eps
    loss = nn.functional.cross_entropy(logits.double(), targets).item()
    assert metrics.loss.compute().item() == pytest.approx(loss, rel=tolerance)
    assert metrics.perplexity.compute().item() == pytest.approx(math.exp(loss), rel=tolerance * loss)
    assert metrics.token_accuracy.compute().item() == pytest.approx((logits.argmax(-1) == targets).double().mean())


def test_a_mean_of_batch_means_would_be_another_number(rows):
    means = [nn.functional.cross_entropy(*row).item() for row in rows]
    assert abs(sum(means) / len(means) - measured(rows, 1).loss.compute().item()) > 0.1


def test_perplexity_is_that_of_torchmetrics():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 9, 30), torch.randint(30, (2, 9))
    targets[0, 4:] = IGNORE_INDEX
    theirs, ours = TorchmetricsPerplexity(ignore_index=IGNORE_INDEX), Perplexity()
    for row in range(2):
        theirs.update(logits[row : row + 1], targets[row : row + 1])
        loss_sum = nn.functional.cross_entropy(logits[row], targets[row], reduction="sum")
        ours.update(loss_sum, (targets[row] != IGNORE_INDEX).sum())
    # the exponent, about 4, carries float32 sums of 13 terms
    tolerance = 4 * 13 * torch.finfo(torch.float32).eps
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=tolerance)


def test_two_ranks_together_give_what_one_gives(rows):
    one, other, whole = measured(rows[:2], 1).loss, measured(rows[2:], 1).loss, measured(rows, 1).loss
    one.merge_state(other)
    assert one.compute() == whole.compute()


def test_a_batch_without_tokens_changes_nothing(rows):
    metrics, before = measured(rows, 1), measured(rows, 1).loss.compute()
    nothing = torch.tensor(0)
    metrics.update(torch.tensor(0.0), nothing, nothing, nothing)
    assert metrics.loss.compute() == before


@pytest.mark.parametrize("metric", [TokenMean, Perplexity])
def test_no_token_gives_nan_and_not_a_loss(metric):
    metric = metric()
    metric.update(torch.tensor(0.0), torch.tensor(0))
    assert metric.compute().isnan()


def test_small_batches_are_not_lost_beside_a_large_sum():
    metric = TokenMean()
    metric.update(torch.tensor(float(2**24)), torch.tensor(2**24))
    for _ in range(2**10):
        metric.update(torch.tensor(0.0), torch.tensor(1))
    # in float32 2**24 + 1 is 2**24, and the mean would stay 1
    assert metric.compute().item() == pytest.approx(2**24 / (2**24 + 2**10), abs=torch.finfo(torch.float32).eps)
    assert metric.compute().item() < 1


def test_reset_forgets(rows):
    metric = measured(rows, 1).loss
    metric.reset()
    metric.update(torch.tensor(6.0), torch.tensor(3))
    assert metric.compute().item() == 2
