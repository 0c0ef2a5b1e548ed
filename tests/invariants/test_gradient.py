"""One window has one gradient, however it is split into rows, micro-batches and accumulation."""

import lightning.pytorch as pl
import pytest
import torch

import synthetic
from phi3_lightning import Phi3LoRAModule

SUPERVISED = [1, 40, 3, 7, 25, 2, 11, 5]
DOCUMENTS = [synthetic.document(count + 4, count, seed) for seed, count in enumerate(SUPERVISED)]
SPLITS = {
    "one batch": ([[[d] for d in DOCUMENTS]], 1),
    "accumulated one by one": ([[[d]] for d in DOCUMENTS], 8),
    "uneven micro-batches": ([[[DOCUMENTS[0]]], [[d] for d in DOCUMENTS[1:6]], [[d] for d in DOCUMENTS[6:]]], 3),
    "a short last window": ([[[d] for d in DOCUMENTS[:5]], [[d] for d in DOCUMENTS[5:]]], 4),
    "packed in two rows": ([[DOCUMENTS[:3], DOCUMENTS[3:]]], 1),
    "packed in one row, with a filler batch": ([[DOCUMENTS], [[(([5, 5]), [-100, -100])]]], 2),
}


class KeepGradient(pl.Callback):
    """What another callback sees before the step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradient = torch.cat([p.grad.flatten().clone() for p in pl_module.trained_parameters()])


def gradient_of(base: str, split: str, tmp_path, **options) -> tuple[torch.Tensor, float]:
    rows, accumulate = SPLITS[split]
    pl.seed_everything(3)
    module = Phi3LoRAModule(base, dtype="float32", lora={"lora_dropout": 0.0}, optimizer={"lr": 1e-3}, **options)
    module.configure_model()
    for parameter in module.trained_parameters():  # a zero B would hide half of the gradient
        torch.nn.init.normal_(parameter, std=0.05)
    keep = KeepGradient()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, accumulate_grad_batches=accumulate, logger=False, callbacks=[keep],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, synthetic.loader([synthetic.batch_of(row) for row in rows]))
    return keep.gradient, trainer.callback_metrics["train/loss"].item()


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[str, torch.Tensor, float]:
    """The gradient of (sum of losses) / (number of tokens), by transformers and autograd alone."""
    folder = tmp_path_factory.mktemp("gradient")
    base = synthetic.save_tiny(folder / "base")
    pl.seed_everything(3)
    module = Phi3LoRAModule(base, dtype="float32", lora={"lora_dropout": 0.0}, gradient_checkpointing="none")
    module.configure_model()
    for parameter in module.trained_parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    total = sum(
        module.model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), use_cache=False).loss * count
        for (ids, labels), count in zip(DOCUMENTS, SUPERVISED, strict=True)
    ) / sum(SUPERVISED)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(module.trained_parameters()))])
    return base, gradient, total.item()


# Sums of 94 token gradients in another order differ by a few float32 roundings each (eps 1.2e-7), through two layers
# of products of about 64 terms: 94 x 1.2e-7 = 1e-5 of the largest entry bounds it with room.
TOLERANCE = sum(SUPERVISED) * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("split", SPLITS)
def test_same_gradient_for_any_split(tmp_path, reference, split, checkpointing):
    base, expected, loss = reference
    gradient, logged = gradient_of(base, split, tmp_path, gradient_checkpointing=checkpointing)
    assert (gradient - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert logged == pytest.approx(loss, rel=TOLERANCE)


def test_mean_of_micro_batch_means_would_be_another_gradient(reference, tmp_path, monkeypatch):
    base, expected, _ = reference
    monkeypatch.setattr(Phi3LoRAModule, "weighted_mean", lambda self, total, count, rows: total / count.clamp(min=1))
    with pytest.warns(UserWarning, match="mean over micro-batches"):
        gradient, _ = gradient_of_plain(base, tmp_path)
    assert (gradient - expected).abs().max() > 100 * TOLERANCE * expected.abs().max()


def gradient_of_plain(base: str, tmp_path) -> tuple[torch.Tensor, float]:
    rows, accumulate = SPLITS["accumulated one by one"]
    pl.seed_everything(3)
    module = Phi3LoRAModule(base, dtype="float32", lora={"lora_dropout": 0.0})
    module.configure_model()
    for parameter in module.trained_parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    keep = KeepGradient()
    pl.Trainer(
        accelerator="cpu", max_steps=1, accumulate_grad_batches=accumulate, logger=False, callbacks=[keep],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    ).fit(module, synthetic.loader([synthetic.batch_of(row) for row in rows]))  # fmt: skip
    return keep.gradient, 0.0
