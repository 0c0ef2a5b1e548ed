"""Optimiser and learning-rate schedule, against their formulas written out."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import Phi3ForCausalLM, get_scheduler

import phi3_lightning
import synthetic
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.adapters.peft_backend import PeftAdapter
from phi3_lightning.config import Optimizer, Schedule
from phi3_lightning.errors import ConfigError
from phi3_lightning.optim import (
    apply_config_to_restored_optimizer,
    decay_steps,
    make_optimizer,
    make_schedule,
    prepare_states,
    warmup_steps,
)

LR = 0.5
TINY = str(Path(phi3_lightning.__file__).parent / "assets/tiny_phi3")


def rates(schedule: Schedule, total: float, steps: int) -> list[float]:
    """The learning rate of each optimiser step."""
    optimizer = make_optimizer([(None, nn.Parameter(torch.ones(2, 2)))], Optimizer(lr=LR), fused=False)
    scheduler = make_schedule(optimizer, schedule, total)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


FORMULAS = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
    "wsd": lambda done: 1 - math.sqrt(max(0, (done - 0.75) / 0.25)),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("least", [0.0, 0.1])
def test_schedule_is_its_formula(name, warmup, least):
    total, least = 20, least * (name != "constant")
    decay = {"decay": (total - warmup) // 4} if name == "wsd" else {}
    expected = [
        LR
        * (step / warmup if step < warmup else least + (1 - least) * FORMULAS[name]((step - warmup) / (total - warmup)))
        for step in range(total)
    ]
    seen = rates(Schedule(name, warmup, least, **decay), total, total)
    assert seen == pytest.approx(expected, rel=1e-12)  # float64 arithmetic
    assert rates(Schedule(name, warmup, least, **decay), total, total + 3)[total:] == pytest.approx(
        [LR * (1 if name == "constant" else least)] * 3
    )  # beyond the end it stays


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (Schedule("linear", 4), "linear", {}),
        (Schedule("cosine", 4), "cosine", {}),
        (Schedule("constant", 4), "constant_with_warmup", {}),
        (Schedule("cosine", 4, 0.25), "cosine_with_min_lr", {"min_lr_rate": 0.25}),
        (Schedule("wsd", 4, decay=8), "warmup_stable_decay", {"num_decay_steps": 8, "decay_type": "1-sqrt"}),
    ],
)
def test_schedules_are_those_of_transformers_to_the_bit(ours, theirs, options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=LR)
    scheduler = get_scheduler(theirs, optimizer, 4, 20, scheduler_specific_kwargs=options)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(ours, 20, 20) == expected


@pytest.mark.parametrize(
    ("schedule", "total", "steps"),
    [
        (Schedule("wsd", 0), 100, 20),
        (Schedule("wsd", 0, decay=0.25), 101, 26),
        (Schedule("wsd", 0.5, decay=0.5), 3, 1),  # both round up, and the warm-up wins
        (Schedule("wsd", 0, decay=7), 10, 7),
        (Schedule("wsd", 3, decay=7), 10, 7),
        (Schedule("wsd"), 1, 1),
        (Schedule("cosine", 3), 10, 7),
        (Schedule("constant", 3), math.inf, 0),
    ],
)
def test_a_decay_fraction_rounds_up_and_a_number_is_exact(schedule, total, steps):
    assert decay_steps(schedule, total) == steps


def test_a_decay_that_outlasts_the_run_is_refused():
    with pytest.raises(
        ConfigError, match=r"model\.schedule\.decay: 8 steps of decay in a run of 10 .* 3 of them warm-up"
    ):
        decay_steps(Schedule("wsd", 3, decay=8), 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "constant", "min_lr_ratio": 0.1}, "min_lr_ratio: 0.1 .*constant does not fall"),
        ({"min_lr_ratio": 1.0}, "min_lr_ratio: 1.0 .*fraction"),
        ({"min_lr_ratio": -0.1}, "min_lr_ratio: -0.1 .*fraction"),
        ({"name": "cosine", "decay": 0.1}, "decay: 0.1 .*cosine has no separate decay"),
        ({"name": "wsd", "decay": 0}, "decay: 0 .*whole number"),
        ({"name": "wsd", "decay": 1.5}, r"decay: 1\.5 .*fraction"),
        ({"name": "wsd", "warmup": 0.5, "decay": 0.6}, r"decay: 0\.6 .*more than the whole run"),
    ],
)
def test_an_option_that_a_schedule_has_no_use_for_is_refused(options, message):
    with pytest.raises(ConfigError, match=rf"^model\.schedule\.{message}"):
        Schedule(**options)


def test_a_run_of_wsd_is_extended_from_before_its_decay():
    schedule = Schedule("wsd", 2, decay=4)
    whole = rates(schedule, 20, 20)
    assert rates(schedule, 10, 6) == whole[:6]
    optimizer = make_optimizer([(None, nn.Parameter(torch.ones(2, 2)))], Optimizer(lr=LR), fused=False)
    first = make_schedule(optimizer, schedule, 10)
    for _ in range(6):
        optimizer.step()
        first.step()
    again = make_schedule(optimizer, schedule, 20)
    again.load_state_dict(first.state_dict())
    apply_config_to_restored_optimizer(optimizer, again, Optimizer(lr=LR))
    resumed = []
    for _ in range(14):
        resumed.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        again.step()
    assert resumed == whole[6:]


@pytest.mark.parametrize(
    ("warmup", "total", "steps"),
    [
        (0.25, 100, 25),
        (0.25, 101, 26),
        (0.03, 1000, 30),
        (0.03, 10, 1),
        (0.0, 10, 0),
        (0, 10, 0),
        (7, 10, 7),
        (0.95, 10, 9),
        (0.5, 1, 0),
    ],
)
def test_a_warmup_fraction_rounds_up_and_a_number_is_exact(warmup, total, steps):
    assert warmup_steps(Schedule(warmup=warmup), total) == steps


@pytest.mark.parametrize(("warmup", "total"), [(10, 10), (11, 10), (1, 1)])
def test_warmup_that_outlasts_the_run_is_refused(warmup, total):
    with pytest.raises(ConfigError, match=rf"model\.schedule\.warmup: .* run of {total} optimiser steps"):
        warmup_steps(Schedule(warmup=warmup), total)


def test_a_run_without_end_takes_a_constant_schedule_with_a_number_of_steps():
    seen = rates(Schedule("constant", 2), math.inf, 5)
    assert seen == [0, LR / 2, LR, LR, LR]


@pytest.mark.parametrize(
    ("schedule", "key"),
    [
        (Schedule("cosine", 2), "name"),
        (Schedule("linear", 2), "name"),
        (Schedule("wsd", 2), "name"),
        (Schedule("constant", 0.1), "warmup"),
    ],
)
def test_a_run_without_end_refuses_what_needs_an_end(schedule, key):
    with pytest.raises(ConfigError, match=rf"model\.schedule\.{key}: "):
        rates(schedule, math.inf, 1)


def test_weight_decay_shrinks_matrices_only():
    parameters = {
        name: nn.Parameter(torch.full(shape, 3.0)) for name, shape in {"matrix": (2, 3), "bias": (3,)}.items()
    }
    trained = [(None, parameter) for parameter in parameters.values()]
    optimizer = make_optimizer(trained, Optimizer(lr=0.1, weight_decay=0.2), fused=False)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)  # so that only weight decay changes it
    optimizer.step()
    assert parameters["matrix"].detach().unique().item() == pytest.approx(3 * (1 - 0.1 * 0.2), rel=1e-6)  # 8 eps
    assert torch.equal(parameters["bias"], torch.full((3,), 3.0))


@pytest.mark.parametrize("fused", [False, True])
def test_steps_are_those_of_torch(fused):
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 3), torch.randn(5, 4, 3)
    config = Optimizer(lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [
        make_optimizer([(None, ours)], config, fused),
        torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6),
    ]
    for gradient in gradients:
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    # 5 steps of about ten roundings each
    torch.testing.assert_close(ours, theirs, rtol=50 * torch.finfo(torch.float32).eps, atol=0)
    assert not torch.equal(theirs, start)


def test_lora_plus_has_the_learning_rates_of_peft(tiny_base):
    config = LoraConfig(r=4, target_modules=["qkv_proj", "down_proj"])
    with warnings.catch_warnings():
        # get_peft_model calls gradient checkpointing of transformers by its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = get_peft_model(Phi3ForCausalLM.from_pretrained(tiny_base), config)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    options = {"lr": 0.01, "loraplus_lr_ratio": 16.0}
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, **options, loraplus_weight_decay=0.1)
    roles = [(PeftAdapter.role(name), parameter) for name, parameter in trained.items()]
    ours = make_optimizer(roles, Optimizer(**options, weight_decay=0.1), fused=True)

    def settings(optimizer) -> dict[int, tuple[float, float]]:
        return {
            id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
        }

    assert settings(ours) == settings(theirs)
    assert {lr for lr, _ in settings(ours).values()} == {0.01, 0.16}


def test_paged_adamw_needs_a_gpu():
    with pytest.raises(ConfigError, match=r"model\.optimizer\.name: 'paged_adamw_8bit' .* needs a GPU; use adamw"):
        make_optimizer([(None, nn.Parameter(torch.ones(2, 2)))], Optimizer("paged_adamw_8bit"), fused=True)


def test_the_state_of_another_optimiser_is_refused_for_training_alone(tmp_path):
    states = [make_optimizer([(None, nn.Parameter(torch.ones(2, 2)))], Optimizer(), fused=False).state_dict()]
    trainer = synthetic.trainer(tmp_path)
    trainer.state.fn = "fit"
    prepare_states(states, Optimizer(), trainer)
    prepare_states(states, Optimizer("paged_adamw_8bit"), None)
    with pytest.raises(ConfigError, match=r"model\.optimizer\.name: .* started with adamw"):
        prepare_states(states, Optimizer("paged_adamw_8bit"), trainer)


def test_a_restored_optimiser_follows_the_present_configuration():
    def make(config: Optimizer) -> tuple:
        parameters = {role: nn.Parameter(torch.ones(2, 2)) for role in ("lora_A", "lora_B")}
        parameters["magnitude"] = nn.Parameter(torch.ones(2))
        optimizer = make_optimizer(parameters.items(), config, fused=False)
        return parameters, optimizer, make_schedule(optimizer, Schedule("linear", 0), 10)

    def step(parameters, optimizer, scheduler) -> None:
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        scheduler.step()

    former = make(Optimizer(lr=0.1, weight_decay=0.5))
    for _ in range(4):
        step(*former)
    now = Optimizer(lr=0.3, loraplus_lr_ratio=2, weight_decay=0.2, betas=(0.5, 0.6), eps=1e-3)
    parameters, optimizer, scheduler = make(now)
    optimizer.load_state_dict(former[1].state_dict())
    scheduler.load_state_dict(former[2].state_dict())
    apply_config_to_restored_optimizer(optimizer, scheduler, now)
    matrices, b_matrices, vectors = optimizer.param_groups
    for group, ratio in ((matrices, 1), (b_matrices, 2), (vectors, 1)):
        assert group["lr"] == pytest.approx(ratio * 0.3 * 0.6)
        assert (group["betas"], group["eps"]) == ((0.5, 0.6), 1e-3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.2, 0.0]
    assert optimizer.state[parameters["lora_A"]]["step"] == 4
    step(parameters, optimizer, scheduler)
    assert (matrices["lr"], b_matrices["lr"]) == (pytest.approx(0.3 * 0.5), pytest.approx(0.6 * 0.5))


@pytest.mark.parametrize("older", [False, True])
def test_a_learning_rate_monitor_shows_each_group_by_its_name(tmp_path, older):
    def fit(epochs: int, ckpt=None) -> tuple[set[str], set[float]]:
        module = Phi3LoRAModule(TINY, dtype="float32", lora={"use_dora": True}, optimizer={"loraplus_lr_ratio": 4})
        data = ChatDataModule(
            train=f"{TINY}/chats_train.jsonl", tokenizer=TINY, cache_dir=str(tmp_path), max_length=64, num_workers=0
        )
        trainer = synthetic.trainer(
            tmp_path,
            callbacks=[LearningRateMonitor()],
            logger=CSVLogger(tmp_path, name="logs"),
            max_epochs=epochs,
            limit_train_batches=2,
            log_every_n_steps=1,
        )
        trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        steps = {moments["step"].item() for moments in trainer.optimizers[0].state.values()}
        return {name for name in trainer.callback_metrics if name.startswith("lr-")}, steps

    names = {"lr-AdamW/lora_A", "lr-AdamW/lora_B", "lr-AdamW/vectors"}
    assert fit(1) == (names, {2.0})
    if older:  # groups had the name of the optimiser
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        for group in saved["optimizer_states"][0]["param_groups"]:
            group["name"] = group.pop("kind")
        torch.save(saved, tmp_path / "last.ckpt")
    assert fit(2, tmp_path / "last.ckpt") == (names, {4.0})
