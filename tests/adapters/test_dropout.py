"""Dropout from 16 random bits per value: as nn.Dropout, from other random numbers."""

import pytest
import torch

from phi3_lightning.adapters.dropout import Dropout


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9999])
@pytest.mark.parametrize("shape", [(3, 1000, 333), (1_000_003,)])
def test_values_are_dropped_with_the_configured_probability(p, shape):
    torch.manual_seed(0)
    found = Dropout(p)(torch.ones(shape))
    dropped = (found == 0).double().mean().item()
    # five standard deviations of the fraction, and the resolution of 16 bits
    assert abs(dropped - p) <= 5 * (p * (1 - p) / found.numel()) ** 0.5 + 2**-17
    assert torch.equal(found[found != 0], torch.full_like(found[found != 0], 1 / (1 - p)))


def test_neighbours_are_dropped_independently():
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(4, 250_000)) != 0).double() - 0.5
    for distance in (1, 2, 3, 4):  # four values share a 64-bit number
        correlation = (kept.flatten()[distance:] * kept.flatten()[:-distance]).mean().item() * 4
        assert abs(correlation) < 5 / kept.numel() ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_dropped_where_the_value_was(dtype):
    torch.manual_seed(0)
    x = torch.randn(40, 50).to(dtype).requires_grad_()
    found = Dropout(0.3)(x)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(gradient != 0, found != 0)
    assert torch.equal(found, torch.where(gradient != 0, x, 0) * (1 / 0.7))


def test_the_seed_decides_and_evaluation_drops_nothing():
    x, layer = torch.randn(100, 7), Dropout(0.3)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(layer(x))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert layer.eval()(x) is x
