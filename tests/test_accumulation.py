"""The exact gradient of a window, for a module and a loss that have nothing to do with Phi-3."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import synthetic
from phi3_lightning.accumulation import AccumulationWindow, MicroBatch, TokenWeightedModule
from phi3_lightning.errors import DivergenceError

LR = 0.1
WIDTH = 8
SIZES = [1, 40, 3, 7, 25]
"""Rows of a micro-batch."""


class Regression(TokenWeightedModule):
    """Fits a line to rows, weighted by their number."""

    weighted = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(WIDTH, 1)

    def loss_sum(self, batch) -> torch.Tensor:
        return (self.line(batch["x"]).squeeze(-1) - batch["y"]).square().sum()

    def training_step(self, batch, batch_idx):
        total, count = self.loss_sum(batch), len(batch["y"])
        return self.weighted_mean(total, count, batch["ids"]) if self.weighted else total / count

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), LR)


class PlainRegression(Regression):
    weighted = False


class Watch(pl.Callback):
    """What a foreign callback sees before each optimiser step."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(flat(p.grad.clone() for p in pl_module.parameters()))


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def weights(module: nn.Module) -> torch.Tensor:
    return flat(module.parameters()).clone()


def batches(sizes=SIZES) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    start = 0
    made = []
    for size in sizes:
        x, y = torch.randn(size, WIDTH, generator=generator), torch.randn(size, generator=generator)
        made.append({"x": x, "y": y, "ids": list(range(start, start + size))})
        start += size
    return made


def exact_gradient(window: list[dict]) -> torch.Tensor:
    """Of the mean over all rows of the window, by autograd on one batch, from the initial weights."""
    module = Regression()
    whole = {name: torch.cat([batch[name] for batch in window]) for name in ("x", "y")}
    return flat(torch.autograd.grad(module.loss_sum(whole) / len(whole["y"]), list(module.parameters())))


def fit(folder, module, data, **options) -> Watch:
    watch = Watch()
    synthetic.trainer(folder, callbacks=[watch], **options).fit(module, synthetic.loader(data))
    return watch


# float32 sums of 76 terms of 8 products each, in another order
TOLERANCE = sum(SIZES) * WIDTH * torch.finfo(torch.float32).eps


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


@pytest.mark.parametrize("accumulate", [5, 8])
def test_callbacks_see_the_gradient_of_the_mean_over_the_window(tmp_path, accumulate):
    watch = fit(tmp_path, Regression(), batches(), accumulate_grad_batches=accumulate)
    assert len(watch.gradients) == 1
    assert_close(watch.gradients[0], exact_gradient(batches()))


def test_a_mean_of_means_is_another_gradient(tmp_path):
    with pytest.warns(UserWarning, match="mean over micro-batches"):
        watch = fit(tmp_path, PlainRegression(), batches(), accumulate_grad_batches=5)
    exact = exact_gradient(batches())
    assert (watch.gradients[0] - exact).abs().max() > 1000 * TOLERANCE * exact.abs().max()


def test_each_window_has_its_own_weight(tmp_path):
    module, start = Regression(), weights(Regression())
    watch = fit(tmp_path, module, batches(), accumulate_grad_batches=3)  # windows of 44 and 32 rows
    assert_close(watch.gradients[0], exact_gradient(batches()[:3]))
    assert_close(weights(module), start - LR * (watch.gradients[0] + watch.gradients[1]))


def test_clipping_comes_after_the_callbacks(tmp_path):
    limit = 0.01
    module, start = Regression(), weights(Regression())
    watch = fit(tmp_path, module, batches(), accumulate_grad_batches=5, gradient_clip_val=limit)
    assert watch.gradients[0].norm() > 10 * limit
    # torch clips to limit / (norm + 1e-6) x norm
    assert ((start - weights(module)) / LR).norm().item() == pytest.approx(limit, rel=1e-4)


def test_loss_and_gradient_norm_are_those_of_the_window(tmp_path):
    module = Regression()
    trainer = synthetic.trainer(tmp_path, accumulate_grad_batches=5)
    trainer.fit(module, synthetic.loader(batches()))
    start = Regression()
    total = sum(start.loss_sum(batch) for batch in batches()).item()
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(total / sum(SIZES), rel=TOLERANCE)
    norm = exact_gradient(batches()).norm().item()
    assert trainer.callback_metrics["train/grad_norm"].item() == pytest.approx(norm, rel=TOLERANCE)


def test_a_plain_mean_warns_once_and_trains_as_the_trainer_does_it(tmp_path):
    class Foreign(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Regression()

        def training_step(self, batch, batch_idx):
            return self.inner.loss_sum(batch) / len(batch["y"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), LR)

    ours, theirs = PlainRegression(), Foreign()
    with pytest.warns(UserWarning, match="weighted_mean did not make") as caught:
        fit(tmp_path, ours, batches(), accumulate_grad_batches=2)
    assert sum("PlainRegression.training_step returns a loss" in str(warning.message) for warning in caught) == 1
    fit(tmp_path, theirs, batches(), accumulate_grad_batches=2)
    assert torch.equal(weights(ours), weights(theirs))


def test_a_micro_batch_of_nothing_changes_nothing(tmp_path):
    nothing = {"x": torch.zeros(0, WIDTH), "y": torch.zeros(0), "ids": []}
    with_it, without = Regression(), Regression()
    fit(tmp_path, with_it, [*batches()[:2], nothing], accumulate_grad_batches=3)
    fit(tmp_path, without, batches()[:2], accumulate_grad_batches=2)
    assert torch.equal(weights(with_it), weights(without))


def test_a_window_of_nothing_is_a_step_with_zero_gradient(tmp_path):
    nothing = {"x": torch.zeros(0, WIDTH), "y": torch.zeros(0), "ids": []}
    module = Regression()
    watch = fit(tmp_path, module, [nothing])
    assert torch.equal(watch.gradients[0], torch.zeros_like(watch.gradients[0]))
    assert torch.equal(weights(module), weights(Regression()))


def test_rows_that_all_weigh_nothing_give_a_zero_gradient(tmp_path):
    class Weightless(Regression):
        def training_step(self, batch, batch_idx):
            return self.weighted_mean(self.loss_sum(batch) * 0, 0, batch["ids"])

    watch = fit(tmp_path, Weightless(), batches()[:1])
    assert torch.equal(watch.gradients[0], torch.zeros_like(watch.gradients[0]))


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path, spoilt):
    class Spoilt(Regression):
        def training_step(self, batch, batch_idx):
            total = self.loss_sum(batch)
            if batch_idx == 3:
                if spoilt == "loss":
                    total = total * float("nan")
                else:  # a finite loss with an infinite gradient
                    total = total + (self.line.bias - self.line.bias.detach()).abs().sqrt().sum()
            return self.weighted_mean(total, len(batch["y"]), batch["ids"])

    module, good = Spoilt(), Regression()
    with pytest.raises(DivergenceError, match=r"optimiser step 2: .*The step was not taken") as caught:
        fit(tmp_path, module, batches(), accumulate_grad_batches=2)
    fit(tmp_path, good, batches()[:2], accumulate_grad_batches=2)
    assert torch.equal(weights(module), weights(good))
    assert caught.value.document_ids == batches()[2]["ids"] + batches()[3]["ids"]


def test_a_large_finite_loss_is_no_divergence(tmp_path):
    class Large(Regression):
        def training_step(self, batch, batch_idx):
            return self.weighted_mean(self.loss_sum(batch) * 1e15, len(batch["y"]), batch["ids"])

    module = Large()
    fit(tmp_path, module, batches()[:1])
    assert weights(module).isfinite().all()


def test_closing_a_window_over_ranks_undoes_their_average():
    gradient, mean = torch.tensor([3.0, 5.0]), torch.tensor([1.0])  # averages over two ranks
    window = AccumulationWindow(
        [MicroBatch(torch.tensor(6.0), torch.tensor(2), [0]), MicroBatch(torch.tensor(1.0), torch.tensor(1), [1])]
    )
    other = torch.tensor([8.0, 4.0], dtype=torch.float64)  # loss and tokens of the other rank
    window.close([gradient, mean], lambda mine: mine + other, 2)
    assert gradient.tolist() == pytest.approx([6 / 7, 10 / 7], rel=2e-7)  # one rounding of float32
    assert mean.item() == pytest.approx(2 / 7, rel=2e-7)
    assert window.loss.item() == pytest.approx(15 / 7, rel=2e-7)
    assert window.document_ids == [0, 1]
