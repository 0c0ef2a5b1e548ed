"""The certificate tells rounding from faults."""

import pytest
import torch
from torch import nn

from phi3_lightning.errors import ModelError
from phi3_lightning.export.certificate import Certificate, Difference, Reference, difference, rounded

NONE = Difference(0.0, 0.0, 1.0)


def test_equal_logits_do_not_differ():
    logits = torch.randn(5, 7)
    assert difference(logits, logits.clone()) == NONE


def test_kl_max_logit_and_same_argmax_follow_their_definitions():
    p, q = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    found = difference(p, q)
    assert found.max_logit == 1.0
    assert found.greedy == 0.5  # one of two positions changes its argmax
    expected = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (p, q))).mean()
    assert found.kl == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("export", "holds"),
    [
        (Difference(0.39, 1e-5, 1.0), True),
        (Difference(0.41, 1e-5, 1.0), False),
        (Difference(0.1, 1e-3, 1.0), False),
        (Difference(float("nan"), 0.0, 1.0), False),
        (Difference(0.1, float("nan"), 1.0), False),
    ],
)
def test_an_export_may_differ_by_four_roundings(export, holds):
    certificate = Certificate("a to b", 9, export, Difference(0.1, 1e-5, 1.0), Difference(3.0, 0.5, 0.2))
    assert certificate.holds is holds
    assert certificate.content()["holds"] is holds
    if holds:
        certificate.check()
    else:
        with pytest.raises(ModelError, match=r"a to b.*4 x 0\.1; nothing was written"):
            certificate.check()


def test_simulated_rounding_is_of_one_unit_and_undone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    clean = model(x)
    with rounded(model, ["1"], torch.bfloat16):
        disturbed = model(x)
    relative = ((disturbed - clean) / clean).abs()
    assert 0 < relative.max() <= 2**-8 * 1.001
    assert torch.equal(model(x), clean)


def test_a_reference_certifies_equal_logits_only():
    reference = Reference("a to b", torch.zeros(3, 4), NONE, NONE)
    assert reference.certify(torch.zeros(3, 4)).holds
    assert not reference.certify(torch.eye(4)[:3]).holds
