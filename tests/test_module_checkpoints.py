"""What a checkpoint of the module holds and restores, and which ones are refused."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from transformers import Phi3ForCausalLM

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.callbacks import RunCheckpoint
from phi3_lightning.checkpoint.identity import IDENTITY
from phi3_lightning.config import LoRA, Optimizer
from phi3_lightning.errors import CheckpointError

BATCHES = [synthetic.batch_of([[synthetic.document(10, 6, seed)]]) for seed in range(4)]
KEY = "model.model.layers.1.mlp.down_proj.lora_B.default.weight"


def small(base: str, **options) -> Phi3LoRAModule:
    defaults = {"dtype": "float32", "lora": {"r": 4, "lora_alpha": 8}, "optimizer": {"lr": 1e-2}}
    return Phi3LoRAModule(base, **defaults | options)


@pytest.fixture(scope="module")
def path(tmp_path_factory, tiny_base) -> Path:
    """A checkpoint after two epochs of four steps."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = synthetic.trainer(folder, max_epochs=2)
    pl.seed_everything(0, verbose=False)
    trainer.fit(small(tiny_base), synthetic.loader(BATCHES))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.fixture
def checkpoint(path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def resume(module, path, folder, **options) -> pl.Trainer:
    trainer = synthetic.trainer(folder, **{"max_epochs": 3} | options)
    trainer.fit(module, synthetic.loader(BATCHES), ckpt_path=path, weights_only=True)
    return trainer


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or type(value) in (str, int, float, bool)


# ---------------------------------------------------------------- content


def test_a_checkpoint_holds_the_adapter_and_no_base_weight(tiny_base, checkpoint):
    module = small(tiny_base)
    module.configure_model()
    trained = {name: parameter.shape for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()} == trained


def test_a_checkpoint_is_no_larger_than_what_is_trained(path, checkpoint):
    values = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    # weight and two moments of 4 bytes, and per tensor a zip entry, its pickled metadata and the step count
    assert path.stat().st_size < 12 * values + 4 * len(checkpoint["state_dict"]) * 1500 + 10_000


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora": LoRA(target_modules=("qkv_proj",)), "optimizer": Optimizer(betas=(0.8, 0.9))},
        {"base_id": "owner/name", "schedule": {"name": "constant", "warmup": 3}, "generation": {"max_new_tokens": 3}},
    ],
)
def test_hyper_parameters_are_plain_and_make_the_same_module(tiny_base, options):
    module = small(tiny_base, **options)
    assert plain(dict(module.hparams))
    assert dict(Phi3LoRAModule(**module.hparams).hparams) == dict(module.hparams)


def test_the_identity_names_no_local_path(checkpoint):
    assert checkpoint[IDENTITY]["base"] is None
    assert len(checkpoint[IDENTITY]["fingerprint"]) == 64
    assert plain(checkpoint[IDENTITY])
    assert checkpoint[IDENTITY]["layers"] == {"qkv_proj": 2, "o_proj": 2, "gate_up_proj": 2, "down_proj": 2}


# ---------------------------------------------------------------- what is restored


def test_loading_gives_a_ready_module(path, checkpoint):
    module = Phi3LoRAModule.load_from_checkpoint(path, weights_only=True)
    saved = checkpoint["state_dict"]
    assert all(torch.equal(parameter, saved[name]) for name, parameter in module.named_parameters() if name in saved)
    assert all(tensor.abs().max() > 0 for tensor in saved.values())
    module.eval()
    with torch.no_grad():
        tuned = module(BATCHES[0])
        with module.base_answers():
            assert not torch.equal(tuned, module(BATCHES[0]))


class KeepRates(pl.Callback):
    """Records the learning rate of each step, and writes a checkpoint after the first epoch."""

    def __init__(self, path: Path | None = None) -> None:
        self.rates: list[float] = []
        self.path = path

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer, pl_module):
        if self.path is not None and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, tiny_base):
    def run(keep: KeepRates, **options) -> Phi3LoRAModule:
        pl.seed_everything(0, verbose=False)
        module = small(tiny_base, schedule={"name": "cosine", "warmup": 6}, lora={"lora_dropout": 0.2})
        trainer = synthetic.trainer(tmp_path, max_epochs=3, callbacks=[keep])
        trainer.fit(module, synthetic.loader(BATCHES), **options)
        return module

    first, rest = KeepRates(tmp_path / "epoch.ckpt"), KeepRates()
    whole = run(first)
    resumed = run(rest, ckpt_path=tmp_path / "epoch.ckpt", weights_only=True)
    assert rest.rates == first.rates[4:]
    assert len(set(first.rates)) > 6
    assert all(map(torch.equal, whole.trained_parameters(), resumed.trained_parameters()))


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_takes_a_checkpoint(tmp_path, tiny_base, path, stage):
    run = getattr(synthetic.trainer(tmp_path), stage)
    (tuned,) = run(small(tiny_base), synthetic.loader(BATCHES), ckpt_path=path, weights_only=True, verbose=False)
    (base,) = run(small(tiny_base), synthetic.loader(BATCHES), verbose=False)
    name = "val/loss" if stage == "validate" else "test/loss"
    assert tuned[name] < base[name]


def test_a_checkpoint_of_weights_alone_evaluates_but_does_not_resume(tmp_path, tiny_base):
    module = small(tiny_base)
    trainer = synthetic.trainer(tmp_path)
    trainer.fit(module, synthetic.loader(BATCHES))
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    loaded = Phi3LoRAModule.load_from_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert all(map(torch.equal, loaded.trained_parameters(), module.trained_parameters()))
    synthetic.trainer(tmp_path).validate(
        small(tiny_base), synthetic.loader(BATCHES), ckpt_path=tmp_path / "weights.ckpt", weights_only=True
    )
    with pytest.raises(CheckpointError, match="save_weights_only"):
        resume(small(tiny_base), tmp_path / "weights.ckpt", tmp_path)


def test_what_the_user_typed_wins_over_the_checkpoint(tmp_path, tiny_base, path):
    module = small(tiny_base, lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.5})
    resume(module, path, tmp_path)
    assert module.lora.lora_dropout == 0.5
    dropouts = {m.p for name, m in module.model.named_modules() if name.endswith("lora_dropout.default")}
    assert dropouts == {0.5}


@pytest.mark.parametrize("lr", [1e-2, 3e-3])
def test_a_changed_learning_rate_resumes_at_the_position_of_the_schedule(tmp_path, tiny_base, lr):
    options = {"schedule": {"name": "cosine", "warmup": 6}}
    whole, rest = KeepRates(tmp_path / "epoch.ckpt"), KeepRates()
    for keep, rate, resumed in ((whole, 1e-2, None), (rest, lr, tmp_path / "epoch.ckpt")):
        trainer = synthetic.trainer(tmp_path, max_epochs=3, callbacks=[keep])
        module = small(tiny_base, optimizer={"lr": rate, "weight_decay": 0.5}, **options)
        trainer.fit(module, synthetic.loader(BATCHES), ckpt_path=resumed, weights_only=True)
    assert rest.rates == pytest.approx([rate * lr / 1e-2 for rate in whole.rates[4:]], rel=1e-12)


# ---------------------------------------------------------------- what is refused


def without(state: dict, *names: str) -> dict:
    return {name: tensor for name, tensor in state.items() if name not in names}


MUTATIONS = {
    "a missing key": (lambda state: without(state, KEY), rf"missing {KEY}"),
    "a renamed key": (
        lambda state: without(state, KEY) | {KEY.replace("lora_B", "lora_b"): state[KEY]},
        rf"missing {KEY}; unexpected .*lora_b",
    ),
    "another shape": (lambda state: state | {KEY: state[KEY].T.contiguous()}, rf"{KEY} has shape \(4, 32\)"),
    "a frozen weight": (
        lambda state: state | {"model.model.norm.weight": torch.zeros(32)},
        r"unexpected model\.model\.norm\.weight",
    ),
    "a NaN": (lambda state: state | {KEY: torch.full_like(state[KEY], float("nan"))}, rf"{KEY} is not finite"),
    "nothing at all": (lambda state: {}, "and 11 more"),
}


def write(checkpoint: dict, path: Path, **changes) -> Path:
    torch.save(checkpoint | changes, path)
    return path


LOADERS = {
    "resume": lambda module, path: resume(module, path, path.parent),
    "load_from_checkpoint": lambda module, path: Phi3LoRAModule.load_from_checkpoint(path, weights_only=True),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mismatched_key_is_refused_by_name(tmp_path, tiny_base, checkpoint, mutation, loader):
    mutate, message = MUTATIONS[mutation]
    broken = write(checkpoint, tmp_path / "broken.ckpt", state_dict=mutate(checkpoint["state_dict"]))
    module = small(tiny_base)
    module.configure_model()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(CheckpointError, match=message):
        LOADERS[loader](module, broken)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("kind", ["another model", "one changed weight", "another dtype"])
def test_another_base_is_refused(tmp_path, tiny_base, path, kind):
    base, options = tiny_base, {}
    if kind == "another model":
        base = synthetic.save_tiny(tmp_path / "other", num_hidden_layers=3)
    elif kind == "another dtype":
        options = {"dtype": "bfloat16"}
    else:
        model = Phi3ForCausalLM.from_pretrained(tiny_base)
        model.model.norm.weight.data[0] += 1
        model.save_pretrained(tmp_path / "other")
        base = str(tmp_path / "other")
    with pytest.raises(CheckpointError, match="belongs to another base model"):
        resume(small(base, **options), path, tmp_path)


@pytest.mark.parametrize(("lora", "key"), [({"r": 8}, "r is 8 and was 4"), ({"lora_alpha": 9}, "lora_alpha is 9")])
def test_another_adapter_is_refused(tmp_path, tiny_base, path, lora, key):
    with pytest.raises(CheckpointError, match=rf"another adapter: model\.lora\.{key}"):
        resume(small(tiny_base, lora={"r": 4, "lora_alpha": 8} | lora), path, tmp_path)


def test_other_targets_are_refused(tmp_path, tiny_base, path):
    module = small(tiny_base, lora={"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj"]})
    with pytest.raises(
        CheckpointError, match=r"target_modules adapts qkv_proj in 2 layers and adapted .*down_proj in 2 layers"
    ):
        resume(module, path, tmp_path)


def test_a_corrupt_optimiser_state_is_refused(tmp_path, tiny_base, checkpoint):
    optimizer = copy.deepcopy(checkpoint["optimizer_states"])
    optimizer[0]["state"][0]["exp_avg"].fill_(float("nan"))
    broken = write(checkpoint, tmp_path / "broken.ckpt", optimizer_states=optimizer)
    with pytest.raises(CheckpointError, match="exp_avg of parameter 0"):
        resume(small(tiny_base), broken, tmp_path)


def test_a_mismatch_is_a_warning_with_on_mismatch_warn(tmp_path, tiny_base, path):
    module = small(tiny_base, lora={"r": 4, "lora_alpha": 16})
    keep = RunCheckpoint(str(tmp_path / "kept"), on_mismatch="warn")
    with pytest.warns(UserWarning, match=r"lora_alpha is 16 and was 8.*loaded all the same"):
        resume(module, path, tmp_path, callbacks=[keep], enable_checkpointing=True)
    wider = small(tiny_base, lora={"r": 8, "lora_alpha": 8})
    with (
        pytest.warns(UserWarning, match="r is 8 and was 4"),
        pytest.raises(CheckpointError, match=r"has shape \(4, 32\) instead of \(8, 32\)"),
    ):
        resume(wider, path, tmp_path, callbacks=[keep], enable_checkpointing=True)


def test_a_checkpoint_of_the_first_format_resumes(tmp_path, tiny_base, path, checkpoint):
    first = {key: checkpoint[IDENTITY][key] for key in ("base", "fingerprint", "lora")} | {"format_version": 1}
    old = write(checkpoint, tmp_path / "old.ckpt", **{IDENTITY: first})
    a, b = small(tiny_base), small(tiny_base)
    resume(a, path, tmp_path)
    resume(b, old, tmp_path)
    assert all(map(torch.equal, a.trained_parameters(), b.trained_parameters()))


def test_a_checkpoint_of_something_else_is_refused(tmp_path, tiny_base):
    class Other(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.line = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.line(torch.ones(1)).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = synthetic.trainer(tmp_path)
    trainer.fit(Other(), synthetic.loader(BATCHES))
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="not written by phi3_lightning"):
        resume(small(tiny_base), tmp_path / "other.ckpt", tmp_path)


def test_loading_without_strict_takes_matching_keys(tiny_base, checkpoint):
    module = small(tiny_base)
    module.configure_model()
    keys = module.load_state_dict(without(checkpoint["state_dict"], KEY) | {"foreign": torch.zeros(1)}, strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == ([KEY], ["foreign"])
    parameters = dict(module.named_parameters())
    assert all(
        torch.equal(parameters[name], tensor) for name, tensor in checkpoint["state_dict"].items() if name != KEY
    )
