"""``model.optimizer.class_path``: any optimiser class, with the groups of LoRA+."""

import inspect

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.config import LoRA, Optimizer, Schedule
from phi3_lightning.distributed.fsdp2 import check_shardable
from phi3_lightning.errors import ConfigError
from phi3_lightning.optim import (
    apply_config_to_restored_optimizer,
    check_optimizer,
    make_optimizer,
    make_schedule,
    state_bytes,
)

BATCHES = [synthetic.batch_of([[synthetic.document(9, 5, seed)]], seed) for seed in range(4)]

IMPOSSIBLE = {
    "LBFGS": "computes the loss several times in a step",
    "SparseAdam": "cannot train an adapter: .*[Ss]parse",
}

CLASSES = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)


class ScheduleFree(torch.optim.SGD):
    """An optimiser that has modes, as those of the package schedulefree."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


class OnGPUAlone(torch.optim.SGD):
    """An optimiser whose step needs a GPU."""

    def step(self, closure=None):
        raise RuntimeError("no kernel for this device")


class Forwarding(torch.optim.SGD):
    """An optimiser that hands its arguments on."""

    def __init__(self, params, **kwargs):
        super().__init__(params, **kwargs)


def of(name: str) -> str:
    return name if "." in name else f"torch.optim.{name}"


def fit(base: str, folder, epochs: int, optimizer: dict, ckpt=None) -> tuple[torch.Tensor, Phi3LoRAModule]:
    lora = {"r": 4, "target_modules": ["qkv_proj", "down_proj"], "lora_dropout": 0.2}
    pl.seed_everything(3, verbose=False)
    module = Phi3LoRAModule(base, lora=lora, optimizer=optimizer, schedule={"name": "constant", "warmup": 1})
    trainer = synthetic.trainer(folder, max_epochs=epochs)
    trainer.fit(module, synthetic.loader(BATCHES), ckpt_path=ckpt, weights_only=True)
    trainer.save_checkpoint(folder / "last.ckpt")
    weights = torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])
    return weights, module


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in IMPOSSIBLE])
def test_every_class_of_torch_takes_its_own_steps_with_the_groups_of_lora_plus(name):
    torch.manual_seed(0)
    start, gradients = torch.randn(2, 4, 3), torch.randn(3, 2, 4, 3)
    kind = getattr(torch.optim, name)
    decay = 0.1 if "weight_decay" in inspect.signature(kind).parameters else 0.0
    config = Optimizer(lr=0.01, loraplus_lr_ratio=4.0, weight_decay=decay, class_path=of(name))
    check_optimizer(config)
    ours, theirs = ([nn.Parameter(each.clone()) for each in start] for _ in range(2))
    groups = [{"params": [theirs[0]], "lr": 0.01}, {"params": [theirs[1]], "lr": 0.04}]
    optimizers = [
        make_optimizer(zip(("lora_A", "lora_B"), ours, strict=True), config, fused=True),
        kind(groups, lr=0.01, **({"weight_decay": decay} if decay else {})),
    ]
    for gradient in gradients:
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for parameter, own in zip(parameters, gradient, strict=True):
                parameter.grad = own.clone()
            optimizer.step()
    assert [group["name"] for group in optimizers[0].param_groups] == ["lora_A", "lora_B"]
    for mine, other, before in zip(ours, theirs, start, strict=True):
        assert torch.equal(mine, other)
        assert not torch.equal(mine, before)


def test_arguments_reach_the_class_and_vectors_do_not_decay():
    config = Optimizer(lr=0.1, weight_decay=0.5, class_path="torch.optim.SGD", init_args={"momentum": 0.9})
    trained = [("lora_A", nn.Parameter(torch.ones(2, 2))), ("magnitude", nn.Parameter(torch.ones(2)))]
    matrices, vectors = make_optimizer(trained, config, fused=False).param_groups
    assert (matrices["momentum"], matrices["weight_decay"], vectors["weight_decay"]) == (0.9, 0.5, 0.0)


def test_a_class_that_hands_its_arguments_on_gets_them():
    options = {"class_path": f"{__name__}.Forwarding", "init_args": {"momentum": 0.9}, "weight_decay": 0.5}
    (group,) = make_optimizer([("lora_A", nn.Parameter(torch.ones(2, 2)))], Optimizer(**options), False).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (2e-4, 0.9, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_path": "SGD"}, r"class_path: 'SGD' .* import path"),
        ({"class_path": "torch.optim.Adan"}, r"class_path: 'torch\.optim\.Adan' cannot be imported"),
        ({"class_path": "lion_pytroch.Lion"}, r"class_path: .* cannot be imported: No module named.*install"),
        (
            {"class_path": "torch.nn.Linear"},
            r"class_path: 'torch\.nn\.Linear' .*no subclass of torch\.optim\.Optimizer",
        ),
        ({"class_path": "torch.optim.lr_scheduler.LambdaLR"}, r"class_path: .*no subclass of"),
        ({"class_path": "ScheduleFree"}, r"class_path: .*switched between training and evaluation"),
        *(({"class_path": of(name)}, rf"class_path: .*{message}") for name, message in IMPOSSIBLE.items()),
        ({"class_path": "torch.optim.SGD", "name": "paged_adamw_8bit"}, r"name: .*either name or class_path"),
        ({"class_path": "torch.optim.SGD", "betas": (0.8, 0.9)}, r"betas: .*init_args"),
        ({"class_path": "torch.optim.SGD", "eps": 1e-6}, r"eps: .*init_args"),
        ({"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}, r"init_args\.lr: .*model\.optimizer\.lr"),
        ({"class_path": "torch.optim.SGD", "init_args": {"params": []}}, r"init_args\.params: "),
        ({"class_path": "torch.optim.SGD", "init_args": {"momentun": 0.9}}, r"init_args\.momentun: .*mean momentum\?"),
        ({"class_path": "torch.optim.SGD", "init_args": {"momentum": -1}}, r"class_path: .*Invalid momentum"),
        ({"class_path": "torch.optim.SGD", "init_args": {"momentum": "much"}}, r"class_path: .*torch\.optim\.SGD"),
        ({"class_path": "torch.optim.SGD", "init_args": {"momentum": torch.ones(1)}}, r"init_args\.momentum: .*YAML"),
        ({"class_path": "torch.optim.Rprop", "weight_decay": 0.1}, r"weight_decay: .*Rprop has no weight decay"),
        ({"init_args": {"momentum": 0.9}}, r"init_args: .*needs class_path"),
    ],
)
def test_what_cannot_train_is_refused_by_name(options, message):
    if options.get("class_path") == "ScheduleFree":
        options = {"class_path": f"{__name__}.ScheduleFree"}
    with pytest.raises(ConfigError, match=rf"^model\.optimizer\.{message}"):
        check_optimizer(Optimizer(**options))


def test_a_class_without_vectors_is_refused_where_there_are_some():
    trained = [("lora_A", nn.Parameter(torch.ones(2, 2))), ("magnitude", nn.Parameter(torch.ones(2)))]
    with pytest.raises(ConfigError, match=r"model\.optimizer\.class_path: torch\.optim\.Muon .*2D"):
        make_optimizer(trained, Optimizer(class_path="torch.optim.Muon"), fused=False)


def test_a_class_that_steps_on_a_gpu_alone_is_not_refused_here():
    config = Optimizer(class_path=f"{__name__}.OnGPUAlone")
    check_optimizer(config)
    assert state_bytes(config) == 0


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 8),
        ({"class_path": "torch.optim.AdamW"}, 8),
        ({"class_path": "torch.optim.AdamW", "init_args": {"amsgrad": True}}, 12),
        ({"class_path": "torch.optim.SGD"}, 0),
        ({"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}, 4),
        ({"class_path": "torch.optim.Adafactor"}, 8 * 64 / 64**2),  # a row and a column of float32
    ],
)
def test_the_state_is_measured_for_plans(options, size):
    assert state_bytes(Optimizer(**options)) == pytest.approx(size)


def test_fsdp2_refuses_it():
    check_shardable(False, None, LoRA(), Optimizer())
    with pytest.raises(ConfigError, match=r"^model\.optimizer\.class_path: .*trainer\.strategy: ddp"):
        check_shardable(False, None, LoRA(), Optimizer(class_path="torch.optim.SGD"))


def test_it_is_refused_before_the_base_is_loaded(tmp_path):
    module = Phi3LoRAModule(str(tmp_path / "no base"), optimizer={"class_path": "torch.optim.LBFGS"})
    with pytest.raises(ConfigError, match="several times"):
        synthetic.trainer(tmp_path).fit(module, synthetic.loader(BATCHES))


@pytest.mark.parametrize(
    "optimizer",
    [
        {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9, "nesterov": True}, "lr": 0.1},
        {"class_path": "torch.optim.Adafactor", "loraplus_lr_ratio": 4.0, "lr": 0.01},
        {"class_path": "torch.optim.Muon", "lr": 0.01},
    ],
)
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, tiny_base, optimizer):
    whole, _ = fit(tiny_base, tmp_path / "whole", 2, optimizer)
    fit(tiny_base, tmp_path / "part", 1, optimizer)
    resumed, module = fit(tiny_base, tmp_path / "part", 2, optimizer, ckpt=tmp_path / "part/last.ckpt")
    assert torch.equal(resumed, whole)
    stored = torch.load(tmp_path / "part/last.ckpt", weights_only=True)["hyper_parameters"]["optimizer"]
    assert stored == module.hparams["optimizer"]
    assert stored["class_path"] == optimizer["class_path"]


@pytest.fixture(scope="module")
def momentum_run(tmp_path_factory, tiny_base):
    folder = tmp_path_factory.mktemp("run")
    fit(tiny_base, folder, 1, {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}})
    return folder / "last.ckpt"


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({}, r"name: 'adamw' .*started with torch\.optim\.SGD"),
        ({"class_path": "torch.optim.RMSprop"}, r"class_path: .*started with torch\.optim\.SGD"),
        (
            {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.5}},
            r"init_args\.momentum: 0\.5 .*started with 0\.9; keep it",
        ),
        ({"class_path": "torch.optim.SGD"}, r"init_args\.momentum: 0 .*started with 0\.9; keep it"),
    ],
)
def test_another_class_or_argument_is_refused_when_resuming(tmp_path, tiny_base, momentum_run, optimizer, message):
    with pytest.raises(ConfigError, match=rf"^model\.optimizer\.{message}"):
        fit(tiny_base, tmp_path, 2, optimizer, ckpt=momentum_run)


def test_learning_rate_and_decay_of_a_class_are_honoured_when_resuming():
    def make(config: Optimizer) -> tuple:
        optimizer = make_optimizer([("lora_B", nn.Parameter(torch.ones(2, 2)))], config, fused=False)
        return optimizer, make_schedule(optimizer, Schedule("constant", 0), 10)

    former, _ = make(Optimizer(lr=0.1, class_path="torch.optim.SGD"))
    now = Optimizer(lr=0.3, loraplus_lr_ratio=2, weight_decay=0.2, class_path="torch.optim.SGD")
    optimizer, scheduler = make(now)
    optimizer.load_state_dict(former.state_dict())
    apply_config_to_restored_optimizer(optimizer, scheduler, now)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.6, 0.2)


def test_a_checkpoint_loads_where_the_package_of_its_optimiser_is_missing(tmp_path, momentum_run):
    saved = torch.load(momentum_run, weights_only=True)
    saved["hyper_parameters"]["optimizer"]["class_path"] = "lion_pytorch.Lion"
    torch.save(saved, tmp_path / "last.ckpt")
    module = Phi3LoRAModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert module.optimizer_config.class_path == "lion_pytorch.Lion"
