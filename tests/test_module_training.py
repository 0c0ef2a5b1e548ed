"""Phi3LoRAModule: training steps against a plain transformers + PEFT loop, schedule, checkpointing, compilation."""

import math

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Phi3ForCausalLM, get_scheduler

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.errors import ConfigError, DivergenceError

EPS = torch.finfo(torch.float32).eps


def small(base, **options) -> Phi3LoRAModule:
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    return Phi3LoRAModule(base, **{"dtype": "float32", "lora": lora, "optimizer": {"lr": 1e-2}} | options)


def documents(count: int) -> list:
    return [synthetic.document(6 + 5 * seed % 17, 2 + 3 * seed % 7, seed) for seed in range(count)]


def batches(count: int, rows: int = 1) -> list:
    made = documents(count * rows)
    return [
        synthetic.batch_of([[document] for document in made[start : start + rows]], start)
        for start in range(0, count * rows, rows)
    ]


class Watch(pl.Callback):
    """Records loss, learning rate and gradients of each optimiser step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.requires_grad})

    def on_train_batch_end(self, trainer, *_):
        if len(self.losses) < trainer.global_step:
            self.losses.append(trainer.callback_metrics["train/loss"].item())


def fit(folder, module, data, **options) -> Watch:
    watch = Watch()
    synthetic.trainer(folder, callbacks=[watch], **options).fit(module, synthetic.loader(data))
    return watch


# ---------------------------------------------------------------- the plain loop


LR = 2e-2


def plain_loop(base: str, data: list, lr: float = LR) -> list[float]:
    """Losses of LoRA training written with transformers and PEFT alone."""
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
    model = get_peft_model(Phi3ForCausalLM.from_pretrained(base), config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.1)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=len(data))
    losses = []
    for batch in data:
        mask = torch.zeros_like(batch["input_ids"])
        for row, (length,) in enumerate(batch["document_lengths"]):
            mask[row, :length] = 1
        loss = model(input_ids=batch["input_ids"], attention_mask=mask, labels=batch["labels"], use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


# get_peft_model calls gradient checkpointing of transformers by its old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_loss_curve_follows_a_plain_loop_on_the_same_batches(tmp_path, tiny_base, checkpointing):
    data = batches(2, rows=3) * 5
    expected = plain_loop(tiny_base, data)
    module = small(
        tiny_base,
        optimizer={"lr": LR, "weight_decay": 0.1},
        schedule={"name": "cosine", "warmup": 2},
        gradient_checkpointing=checkpointing,
    )
    torch.manual_seed(5)
    module.configure_model()
    watch = fit(tmp_path, module, data, gradient_clip_val=0.5)
    tolerance = curve_tolerance(module, watch)
    assert watch.losses == pytest.approx(expected, abs=tolerance)
    assert expected[-2] < expected[0] - 100 * tolerance  # the same batch, for the fifth time
    assert plain_loop(tiny_base, data, lr=0.95 * LR) != pytest.approx(expected, abs=tolerance)


def curve_tolerance(module: Phi3LoRAModule, watch: Watch) -> float:
    """How far two float32 runs of the same ten steps may drift apart.

    A gradient entry carries an error of (terms) x eps of the largest entry. AdamW divides each entry by its own size,
    so that the error moves an entry of size g by lr x error / g, and the loss by g times that: lr x error for each of
    the entries, whatever its size. Over ten steps this adds up.
    """
    terms, entries = 64, sum(parameter.numel() for parameter in module.trained_parameters())
    largest = max(gradient.abs().max().item() for step in watch.gradients for gradient in step.values())
    return len(watch.gradients) * LR * entries * terms * EPS * largest


# ---------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_neither_loss_nor_gradient(tmp_path, tiny_base, dropout):
    watches = []
    for checkpointing in ("none", "full"):
        lora = {"r": 4, "lora_alpha": 8, "lora_dropout": dropout}
        module = synthetic.randomised(small(tiny_base, lora=lora, gradient_checkpointing=checkpointing))
        watches.append(fit(tmp_path, module, batches(2)))
    plain, recomputed = watches
    # the same operations on the same numbers, with a second forward
    assert plain.losses == recomputed.losses
    for one, other in zip(plain.gradients, recomputed.gradients, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_every_layer_gets_a_gradient_from_the_first_step(tmp_path, tiny_base, checkpointing, dropout):
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": dropout}
    schedule = {"name": "constant", "warmup": 0}
    module = small(tiny_base, lora=lora, gradient_checkpointing=checkpointing, schedule=schedule)
    watch = fit(tmp_path, module, batches(2))
    first, second = watch.gradients
    assert all(gradient.abs().max() > 0 for name, gradient in first.items() if ".lora_B." in name)
    assert all(gradient.abs().max() > 0 for gradient in second.values())
    assert len(first) == 16


# ---------------------------------------------------------------- schedule


def cosine(step: int, warmup: int, total: int) -> float:
    return step / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def test_the_learning_rate_moves_once_an_optimiser_step(tmp_path, tiny_base):
    module = small(tiny_base, schedule={"name": "cosine", "warmup": 10})
    watch = fit(tmp_path, module, batches(40), accumulate_grad_batches=4, max_epochs=2)
    assert watch.rates == pytest.approx([1e-2 * cosine(step, 10, 20) for step in range(20)], rel=1e-12)


@pytest.mark.parametrize(
    ("length", "warmup", "total", "steps"),
    [
        ({"max_epochs": 2}, 0.25, 6, 2),  # 11 batches in windows of 4: 3 steps an epoch; 1.5 rounds up
        ({"max_epochs": -1, "max_steps": 5}, 0.2, 5, 1),
        ({"max_epochs": 2, "max_steps": -1}, 0, 6, 0),
        ({"max_epochs": 2, "max_steps": 4}, 3, 4, 3),
        ({"max_epochs": 2, "limit_train_batches": 5}, 1, 4, 1),
    ],
)
def test_the_schedule_spans_the_run(tmp_path, tiny_base, length, warmup, total, steps):
    module = small(tiny_base, schedule={"name": "linear", "warmup": warmup})
    watch = fit(tmp_path, module, batches(11), accumulate_grad_batches=4, **length)
    expected = [step / steps if step < steps else 1 - (step - steps) / (total - steps) for step in range(total)]
    assert watch.rates == pytest.approx([1e-2 * rate for rate in expected], rel=1e-12)


def test_warmup_that_outlasts_the_run_is_refused_before_the_first_step(tmp_path, tiny_base):
    module = small(tiny_base, schedule={"warmup": 20})
    with pytest.raises(ConfigError, match=r"model\.schedule\.warmup: 20 steps .* run of 20 optimiser steps"):
        fit(tmp_path, module, batches(40), accumulate_grad_batches=4, max_epochs=2)


def test_a_run_without_end_needs_a_constant_schedule(tmp_path, tiny_base):
    endless = {"max_epochs": -1, "max_time": {"seconds": 1}}
    with pytest.raises(ConfigError, match=r"model\.schedule\.name: cosine falls until the end of the run"):
        fit(tmp_path, small(tiny_base), batches(2), **endless)

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 3

    module = small(tiny_base, schedule={"name": "constant", "warmup": 1})
    trainer = synthetic.trainer(tmp_path, max_epochs=-1, callbacks=[Stop()])
    trainer.fit(module, synthetic.loader(batches(2)))
    assert trainer.global_step == 3


# ---------------------------------------------------------------- divergence


class Diverging(Phi3LoRAModule):
    """Has a NaN loss at its third batch."""

    def compute_loss(self, hidden, head, batch):
        total, count = super().compute_loss(hidden, head, batch)
        return total * (float("nan") if batch["document_ids"][0] == [2] else 1.0), count


def test_a_loss_that_is_not_a_number_stops_before_the_step(tmp_path, tiny_base):
    module, good = (Diverging(tiny_base, dtype="float32", schedule={"name": "constant", "warmup": 0}) for _ in range(2))
    for each in (module, good):
        torch.manual_seed(5)
        each.configure_model()
    with pytest.raises(DivergenceError, match="optimiser step 2: the loss is nan") as caught:
        fit(tmp_path, module, batches(4), accumulate_grad_batches=2, max_epochs=3)
    assert caught.value.document_ids == [2, 3]
    fit(tmp_path, good, batches(2), accumulate_grad_batches=2)
    assert all(map(torch.equal, module.trained_parameters(), good.trained_parameters()))


# ---------------------------------------------------------------- compilation


# torch accesses .grad of every tensor it traces
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo, of an autograd function
@pytest.mark.parametrize("place", ["model", "layers", "wrapper"])
def test_compilation_leaves_no_trace_in_a_checkpoint(tmp_path, tiny_base, place):
    module = small(tiny_base)
    module.configure_model()
    if place == "model":
        module.model.compile(backend="eager")
    elif place == "layers":
        for layer in module.model.model.layers:
            layer.compile(backend="eager")
    else:
        module.model = torch.compile(module.model, backend="eager")
    trainer = synthetic.trainer(tmp_path)
    trainer.fit(module, synthetic.loader(batches(2)))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    keys = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert not [key for key in keys if "_orig_mod" in key]
    plain = Phi3LoRAModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert all(map(torch.equal, module.trained_parameters(), plain.trained_parameters()))
    trainer = synthetic.trainer(tmp_path, max_epochs=2)
    trainer.fit(module, synthetic.loader(batches(2)), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert trainer.global_step == 4
