"""Metrics of preferences against plain arithmetic over all answers."""

import math

import pytest
import torch

from phi3_lightning.metrics import PreferenceMetrics, RankingByLabel
from phi3_lightning.objectives import AnswerScores


def scores(seed: int, chosen: int, rejected: int) -> tuple[AnswerScores, AnswerScores]:
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> AnswerScores:
        rewards = torch.randint(-2, 3, (count,), generator=generator).float()  # with ties
        means = -torch.randint(1, 6, (count,), generator=generator).float() / 2
        return AnswerScores(rewards, -10 * torch.rand(count, generator=generator), means)

    return some(chosen), some(rejected)


def half(left: float, right: float) -> float:
    return float(left > right) + (left == right) / 2


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def measured(paired: bool, batches: list[tuple[AnswerScores, AnswerScores]]) -> dict[str, float]:
    metrics = PreferenceMetrics(paired)
    for chosen, rejected in batches:
        weight = torch.tensor(len(chosen.logps) if paired else len(chosen.logps) + len(rejected.logps))
        metrics.update(weight * 2.0, weight, (chosen, rejected))
    return {name: metric.compute().item() for name, metric in metrics.by_name().items()}


def joined(batches, side: int, name: str) -> list[float]:
    return torch.cat([getattr(batch[side], name) for batch in batches]).tolist()


def test_pairs():
    batches = [scores(seed, count, count) for seed, count in enumerate((3, 1, 7, 0, 4))]
    chosen, rejected = ({name: joined(batches, side, name) for name in AnswerScores.__annotations__} for side in (0, 1))
    found = measured(True, batches)
    assert found == pytest.approx(
        {
            "loss": 2.0,
            "preference_accuracy": mean(map(half, chosen["rewards"], rejected["rewards"])),
            "ranking_accuracy": mean(map(half, chosen["mean_logps"], rejected["mean_logps"])),
            "reward_margin": mean(c - r for c, r in zip(chosen["rewards"], rejected["rewards"], strict=True)),
            "chosen_logp": mean(chosen["logps"]),
            "rejected_logp": mean(rejected["logps"]),
        },
        rel=1e-6,
    )
    assert any(c == r for c, r in zip(chosen["rewards"], rejected["rewards"], strict=True))  # ties are there


def test_answers_by_label():
    batches = [scores(seed, *counts) for seed, counts in enumerate(((3, 5), (1, 0), (0, 4), (6, 2)))]
    good, bad = ({name: joined(batches, side, name) for name in AnswerScores.__annotations__} for side in (0, 1))
    found = measured(False, batches)
    right = [half(reward, 0) for reward in good["rewards"]] + [half(0, reward) for reward in bad["rewards"]]
    assert found == pytest.approx(
        {
            "loss": 2.0,
            "preference_accuracy": mean(right),
            "ranking_accuracy": mean(half(g, b) for g in good["mean_logps"] for b in bad["mean_logps"]),
            "reward_margin": mean(good["rewards"]) - mean(bad["rewards"]),
            "chosen_logp": mean(good["logps"]),
            "rejected_logp": mean(bad["logps"]),
        },
        rel=1e-6,
    )


@pytest.mark.parametrize("paired", [True, False])
def test_the_split_into_batches_does_not_matter(paired):
    chosen, rejected = scores(3, 12, 12)

    def part(scores: AnswerScores, places: slice) -> AnswerScores:
        return AnswerScores(scores.rewards[places], scores.logps[places], scores.mean_logps[places])

    batches = [(part(chosen, slice(at, at + 5)), part(rejected, slice(at, at + 5))) for at in (0, 5, 10)]
    assert measured(paired, batches) == pytest.approx(measured(paired, [(chosen, rejected)]), rel=1e-12)


def test_answers_of_one_label_cannot_be_ranked():
    metric = RankingByLabel()
    metric.update(torch.tensor([-1.0, -2.0]), torch.tensor([]))
    assert math.isnan(metric.compute())


def test_a_loss_without_grades_is_all_that_there_is():
    metrics = PreferenceMetrics(paired=True)
    metrics.update(torch.tensor(3.0), torch.tensor(2), None)
    assert [*metrics.by_name()] == ["loss"]
