"""Losses of pairs and of labelled answers against their papers' formulas, in float64."""

import math

import pytest
import torch

from phi3_lightning.config import Objective
from phi3_lightning.objectives import PAIRWISE, Answers, kto, preference

EPSILON = torch.finfo(torch.float32).eps
CHOSEN, REJECTED = [-3.0, -40.0, -0.001, -7.0], [-5.0, -38.0, -2.0, -7.0]
REFERENCE = [-4.0, -41.0, -0.5, -7.0], [-4.5, -38.5, -1.0, -7.0]
TOKENS = [3, 20, 1, 7], [5, 19, 2, 7]


def answers(logps, tokens, reference) -> Answers:
    return Answers(torch.tensor(logps, requires_grad=True), torch.tensor(tokens), torch.tensor(reference))


def pairs() -> tuple[Answers, Answers]:
    return answers(CHOSEN, TOKENS[0], REFERENCE[0]), answers(REJECTED, TOKENS[1], REFERENCE[1])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def dpo(c, r, nc, nr, rc, rr, beta=0.1, flipped=0.0):
    margin = beta * ((c - rc) - (r - rr))
    clean, wrong = -math.log(sigmoid(margin)), -math.log(sigmoid(-margin))
    return ((1 - flipped) * clean - flipped * wrong) / (1 - 2 * flipped)


def ipo(c, r, nc, nr, rc, rr, beta=0.1):
    return ((c - rc) / nc - (r - rr) / nr - 1 / (2 * beta)) ** 2


def orpo(c, r, nc, nr, rc, rr, beta=0.1):
    p, q = math.exp(c / nc), math.exp(r / nr)
    return -c / nc - beta * math.log(sigmoid(math.log(p / (1 - p)) - math.log(q / (1 - q))))


def simpo(c, r, nc, nr, rc, rr, beta=2.0, gamma=0.3):
    return -math.log(sigmoid(beta * (c / nc - r / nr) - gamma))


CASES = {
    "dpo": (Objective("dpo"), dpo),
    "dpo with flipped labels": (
        Objective("dpo", beta=0.5, label_smoothing=0.2),
        lambda *pair: dpo(*pair, beta=0.5, flipped=0.2),
    ),
    "ipo": (Objective("ipo"), ipo),
    "orpo": (Objective("orpo"), orpo),
    "simpo": (Objective("simpo", beta=2.0, simpo_gamma=0.3), simpo),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_of_a_pair_is_that_of_the_formula(case):
    objective, formula = CASES[case]
    result = preference(*pairs(), objective)
    expected = [formula(*pair) for pair in zip(CHOSEN, REJECTED, *TOKENS, *REFERENCE, strict=True)]
    # sums of log-probabilities of up to 40 nats, rounded to float32, through functions that stretch them by 1 at most,
    # but for the square of ipo, by twice its root
    stretch = 2 * max(expected) ** 0.5 if case == "ipo" else 1
    assert result.loss_sum.item() == pytest.approx(sum(expected), abs=40 * 8 * EPSILON * stretch)
    assert result.weight.item() == len(CHOSEN)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_finite_differences(case):
    objective, formula = CASES[case]
    chosen, rejected = pairs()
    preference(chosen, rejected, objective).loss_sum.backward()
    step = 1e-5
    for index, (c, r, *rest) in enumerate(zip(CHOSEN, REJECTED, *TOKENS, *REFERENCE, strict=True)):
        by_chosen = (formula(c + step, r, *rest) - formula(c - step, r, *rest)) / (2 * step)
        by_rejected = (formula(c, r + step, *rest) - formula(c, r - step, *rest)) / (2 * step)
        # the third derivative times the square of the step, and float32
        assert chosen.logps.grad[index].item() == pytest.approx(by_chosen, rel=1e-3, abs=1e-5)
        assert rejected.logps.grad[index].item() == pytest.approx(by_rejected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo"])
def test_the_likelihood_term_is_the_mean_over_tokens_and_then_over_pairs(name):
    plain = preference(*pairs(), Objective(name)).loss_sum
    weighted = preference(*pairs(), Objective(name, sft_weight=0.7)).loss_sum
    likelihood = sum(-c / n for c, n in zip(CHOSEN, TOKENS[0], strict=True))
    assert (weighted - plain).item() == pytest.approx(0.7 * likelihood, rel=1e-4)


@pytest.mark.parametrize("name", PAIRWISE)
def test_rewards_are_against_the_reference_where_there_is_one(name):
    result = preference(*pairs(), Objective(name, beta=0.3))
    if name in ("dpo", "ipo"):
        expected = [0.3 * (c - r) for c, r in zip(CHOSEN, REFERENCE[0], strict=True)]
    else:
        expected = [0.3 * c / n for c, n in zip(CHOSEN, TOKENS[0], strict=True)]
    assert result.chosen.rewards.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert not result.chosen.rewards.requires_grad


def test_orpo_is_finite_where_an_answer_is_almost_certain():
    """The branch of log(1 - exp(x)) that is not taken has no finite gradient there."""
    certain = answers([-1e-7, -200.0], [1, 1], [0.0, 0.0])
    other = answers([-200.0, -1e-7], [1, 1], [0.0, 0.0])
    result = preference(certain, other, Objective("orpo"))
    result.loss_sum.backward()
    assert result.loss_sum.isfinite()
    assert certain.logps.grad.isfinite().all()
    assert other.logps.grad.isfinite().all()


def kto_loss(good, bad, baseline, beta=0.1, desirable=1.0, undesirable=1.0):
    wins = [desirable * (1 - sigmoid(beta * (h - baseline))) for h in good]
    return sum(wins + [undesirable * (1 - sigmoid(beta * (baseline - h))) for h in bad])


@pytest.mark.parametrize("drift", [5.0, -5.0])
def test_kto_is_that_of_the_formula(drift):
    good, bad = pairs()
    mismatched = answers([-10.0 + drift, -20.0 + drift], [4, 4], [-10.0, -20.0])
    objective = Objective("kto", beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)
    result = kto(good, bad, mismatched, objective)
    ratios = [
        [p - r for p, r in zip(*each, strict=True)] for each in ((CHOSEN, REFERENCE[0]), (REJECTED, REFERENCE[1]))
    ]
    expected = kto_loss(*ratios, max(drift, 0), 0.2, 1.5, 0.5)
    assert result.loss_sum.item() == pytest.approx(expected, abs=40 * 8 * EPSILON)
    assert result.weight.item() == 8
    result.loss_sum.backward()
    assert mismatched.logps.grad is None  # the baseline is a constant


@pytest.mark.parametrize("name", [*PAIRWISE, "kto"])
def test_no_answer_at_all_gives_zero_with_a_graph(name):
    none = answers([], [], [])
    result = kto(none, none, none, Objective("kto")) if name == "kto" else preference(none, none, Objective(name))
    result.loss_sum.backward()
    assert (result.loss_sum.item(), result.weight.item()) == (0, 0)
    assert none.logps.grad.shape == (0,)
