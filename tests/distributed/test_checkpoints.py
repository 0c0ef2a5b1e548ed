"""A checkpoint of any strategy and number of ranks resumes under any other, and holds only the adapter."""

import itertools
import os

import pytest
import torch

import synthetic
from phi3_lightning.callbacks import RunCheckpoint
from phi3_lightning.checkpoint.io import read_checkpoint
from phi3_lightning.errors import ConfigError, ModelError

from . import cases, ranks

STRATEGIES = {"one process": ("auto", 1), "ddp": ("ddp", 2), "fsdp2": ({}, 2), "fsdp2, three": ({}, 3)}
ROWS = [synthetic.batch_of([[d] for d in cases.DOCUMENTS[i : i + 2]]) for i in (0, 2, 4)]


def path_of(folder, name, steps):
    return folder / f"{name}-{steps}" / "last.ckpt"


def train_until(base, folder, name, steps, resume=None, kind=cases.Sgd):
    """Train up to ``steps``; each step's window holds all rows, one batch of them on each rank."""
    strategy, world = STRATEGIES[name]
    windows = {1: [synthetic.batch_of([[d] for d in cases.DOCUMENTS[:6]])], 2: [*ROWS, cases.EMPTY], 3: ROWS}

    def run():
        cases.pl.seed_everything(3, verbose=False)
        chosen = cases.fsdp2(**strategy) if isinstance(strategy, dict) else strategy
        module = cases.module(base, kind)
        if resume is not None:
            module.on_fit_start = lambda: type(module).__mro__[1].on_fit_start(module)  # no new values
        keep = cases.RecordSteps()
        callbacks = [keep, RunCheckpoint(str(path_of(folder, name, steps).parent))]
        trainer = cases.trainer(
            folder, chosen, world, callbacks=callbacks, use_distributed_sampler=False, max_steps=steps, max_epochs=-1,
            accumulate_grad_batches=2 if world == 2 else 1, enable_checkpointing=True,
        )  # fmt: skip
        loader = cases.loader(windows[world] * 2, int(os.environ.get("LOCAL_RANK", "0")) if world > 1 else 0, world)
        trainer.fit(module, loader, ckpt_path=resume)
        weights = torch.cat([cases.whole(p).flatten() for p in module.trained_parameters()])
        return weights, keep.losses, trainer.global_step

    return [run()] if world == 1 else ranks.run(folder, world, run)


def first_half(base, folder, kind):
    """Two steps of every strategy, and the weights and losses of a run of four that was never interrupted."""
    for name in STRATEGIES:
        train_until(base, folder, name, 2, kind=kind)
    weights, losses, _ = train_until(base, folder, "one process", 4, kind=kind)[0]
    return folder, weights, losses


@pytest.fixture(scope="module")
def of_sgd(base, tmp_path_factory):
    return first_half(base, tmp_path_factory.mktemp("sgd"), cases.Sgd)


@pytest.fixture(scope="module")
def of_adamw(base, tmp_path_factory):
    return first_half(base, tmp_path_factory.mktemp("adamw"), cases.Phi3LoRAModule)


TOLERANCE = 4 * sum(cases.SUPERVISED[:6]) * cases.EPSILON
"""Four steps, each a sum in another order."""
SOME = [("one process", "ddp"), ("ddp", "fsdp2"), ("fsdp2", "one process"), ("fsdp2, three", "ddp")]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [*itertools.product(STRATEGIES, STRATEGIES)])
def test_every_strategy_resumes_from_every_other(base, of_sgd, first, second):
    folder, weights, losses = of_sgd
    for found, later, step in train_until(base, folder, second, 4, str(path_of(folder, first, 2)), cases.Sgd):
        assert step == 4
        assert later[-2:] == pytest.approx(losses[-2:], rel=TOLERANCE)
        assert (found - weights).abs().max() <= TOLERANCE * weights.abs().max()


@pytest.mark.parametrize(("first", "second"), SOME)
def test_moments_of_adamw_are_restored_under_another_strategy(base, of_adamw, first, second):
    folder, _, losses = of_adamw
    resume = str(path_of(folder, first, 2))
    for _, later, step in train_until(base, folder, second, 4, resume, cases.Phi3LoRAModule):
        assert step == 4
        assert later[-2:] == pytest.approx(losses[-2:], rel=TOLERANCE)


def test_a_checkpoint_holds_whole_adapters_alone(of_adamw):
    folder = of_adamw[0]
    checkpoints = {name: read_checkpoint(path_of(folder, name, 2)) for name in STRATEGIES}
    expected = checkpoints["one process"]
    for name, found in checkpoints.items():
        assert found.keys() == expected.keys()
        assert found["phi3_lightning"] == expected["phi3_lightning"], name
        shapes = {key: tensor.shape for key, tensor in found["state_dict"].items()}
        assert shapes == {key: tensor.shape for key, tensor in expected["state_dict"].items()}
        states = [state["state"] for state in found["optimizer_states"]]
        assert [list(state) for state in states] == [list(s["state"]) for s in expected["optimizer_states"]]
    assert not list(folder.rglob("*.tmp"))


def test_a_sharded_checkpoint_is_refused():
    with pytest.raises(
        ConfigError, match=r"save_distributed_checkpoint: True cannot be used: a checkpoint is one file"
    ):
        cases.fsdp2(save_distributed_checkpoint=True)


def refusal(folder, base, strategy, **model):
    if isinstance(strategy, dict):
        strategy = cases.fsdp2(**strategy)
    trainer = cases.trainer(folder, strategy, 1)
    try:
        trainer.fit(cases.module(base, **model), synthetic.loader(ROWS))
    except (ConfigError, ModelError) as error:
        return str(error)
    return ""


def test_fsdp2_refuses_what_it_cannot_shard(base, tmp_path, batches):
    assert "model.quantization" in ranks.run(tmp_path, 1, lambda: refusal(tmp_path, base, {}, quantization="nf4"))[0]
    loaded = cases.module(base)
    loaded.configure_model()
    model = loaded.detach_adapter()
    assert "give its folder" in ranks.run(tmp_path, 1, lambda: refusal(tmp_path, model, {}))[0]


@pytest.mark.parametrize(
    ("key", "model"),
    [
        ("model.lora.use_dora", {"lora": {"use_dora": True}}),
        ("model.lora.modules_to_save", {"lora": {"modules_to_save": ["lm_head"]}}),
        ("model.lora.init_lora_weights", {"lora": {"init_lora_weights": "eva"}}),
        ("model.optimizer.name", {"optimizer": {"name": "paged_adamw_8bit"}}),
    ],
)
def test_fsdp2_refuses_options_that_need_whole_weights(base, tmp_path, key, model):
    assert key in ranks.run(tmp_path, 1, lambda: refusal(tmp_path, base, {}, **model))[0]


def test_lightnings_model_parallel_strategy_is_refused(base, tmp_path):
    plain = cases.pl.strategies.ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    assert "phi3_lightning.FSDP2Strategy" in ranks.run(tmp_path, 1, lambda: refusal(tmp_path, base, plain))[0]
