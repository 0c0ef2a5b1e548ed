"""The model as the run began: what it computes, that it never moves, and that a restart has it."""

import copy
import shutil

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import save_file
from transformers import Phi3ForCausalLM

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.checkpoint.identity import IDENTITY
from phi3_lightning.errors import CheckpointError
from phi3_lightning.model.loss import document_losses
from phi3_lightning.objective_mixin import REFERENCE
from phi3_lightning.reference import trained_weights

PAIRS = [synthetic.pair(3 + 5 * seed % 17, 2 + 3 * seed % 7, 1 + 5 * seed % 8, seed) for seed in range(8)]
BATCH = synthetic.pairs_of([PAIRS[:4], PAIRS[4:]])
BATCHES = [synthetic.pairs_of([[pair]], index) for index, pair in enumerate(PAIRS)]
LABELLED = [synthetic.labelled_of([[pair[0], pair[1]]], [[True, False]], 2 * index) for index, pair in enumerate(PAIRS)]
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.3}
KINDS = {
    "peft": {},
    "loralib": {"backend": "loralib"},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["qkv_proj", "embed_tokens"]},
}


def small(base, lora=(), **options) -> Phi3LoRAModule:
    options = {"dtype": "float32", "optimizer": {"lr": 1e-2}, "objective": {"name": "dpo"}} | options
    return Phi3LoRAModule(base, lora=LORA | dict(lora), **options)


@pytest.fixture(scope="module", params=KINDS)
def start(request, tiny_base, tmp_path_factory):
    """An adapter with an effect, as a checkpoint of supervised training, and the options of its kind."""
    folder = tmp_path_factory.mktemp(request.param)
    module = synthetic.randomised(small(tiny_base, KINDS[request.param], objective={"name": "supervised"}), std=0.1)
    trainer = synthetic.trainer(folder, max_steps=1)
    trainer.fit(module, synthetic.loader([synthetic.batch_of([[PAIRS[0][0]]])]))
    trainer.save_checkpoint(folder / "sft.ckpt")
    return folder / "sft.ckpt", KINDS[request.param]


def from_start(base, start, folder, **options) -> Phi3LoRAModule:
    path, lora = start
    copied = folder / "start.ckpt"
    shutil.copyfile(path, copied)
    return small(base, {**lora, "init_from": str(copied)}, **options)


def losses(module, batch=BATCH) -> torch.Tensor:
    with torch.no_grad(), module.autocast():
        return document_losses(module(batch), module.head, batch)[0]


def by_reference(module, batch=BATCH) -> torch.Tensor:
    with module.autocast(), module.reference.active(module, module.adapter):
        return losses(module, batch)


# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_of_a_fresh_adapter_is_the_base(tiny_base, kind):
    module = synthetic.randomised(small(tiny_base, KINDS[kind]), std=0.1)
    module.model.train()
    expected = losses_of_base(tiny_base)
    # float32 sums of up to 8 token losses, of two kernels
    torch.testing.assert_close(by_reference(module), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(losses(module.eval()), expected, rtol=1e-3)
    assert module.reference.fingerprint is None


def losses_of_base(base: str) -> torch.Tensor:
    model = Phi3ForCausalLM.from_pretrained(base)
    found = []
    for document in (document for pair in PAIRS for document in pair):
        ids, labels = (torch.tensor([each]) for each in document)
        with torch.no_grad():
            found.append(model(ids, labels=labels, use_cache=False).loss * (labels != -100).sum())
    return torch.stack(found)


def test_the_reference_is_the_adapter_that_the_run_starts_from(tiny_base, start, tmp_path):
    module = from_start(tiny_base, start, tmp_path)
    module.configure_model()
    expected = losses(module.eval())
    module.model.train()
    assert torch.equal(by_reference(module), expected)  # at the same time: dropout is off
    synthetic.randomised(module, std=0.2)
    assert torch.equal(by_reference(module), expected)
    assert not torch.allclose(losses(module.eval()), expected, rtol=1e-3)
    assert not torch.allclose(losses_of_base(tiny_base), expected, rtol=1e-3)


def test_the_base_s_own_answers_stay_those_of_the_base(tiny_base, start, tmp_path):
    module = from_start(tiny_base, start, tmp_path)
    module.configure_model()
    with module.base_answers():
        found = losses(module.eval())
    # float32 sums of up to 8 token losses, of two kernels
    torch.testing.assert_close(found, losses_of_base(tiny_base), rtol=1e-5, atol=1e-5)


def test_autocast_does_not_mistake_the_reference_for_the_model(tiny_base, start, tmp_path):
    """It keeps what it has cast of trained weights, and both are computed in one of its contexts."""
    module = from_start(tiny_base, start, tmp_path)
    module.configure_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = losses(module.eval())
    synthetic.randomised(module, std=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(BATCH).sum()
        own = losses(module)
        assert torch.equal(by_reference(module), expected)
        assert torch.equal(losses(module), own)


def test_modes_parameters_and_gradients_are_as_they_were(tiny_base, start, tmp_path):
    module = from_start(tiny_base, start, tmp_path)
    module.configure_model()
    module.model.train()
    module.model.model.layers[0].eval()  # a mode of its own, which nobody may change
    modes = [each.training for each in module.modules()]
    parameters = list(module.named_parameters())
    total, _ = module.compute_loss(module(BATCH), module.head, BATCH)
    total.backward()
    assert [each.training for each in module.modules()] == modes
    assert all(a is b for (_, a), (_, b) in zip(parameters, module.named_parameters(), strict=True))
    assert all(p.grad is not None for p in module.trained_parameters())
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in module.reference.state_dict().values())


def test_an_error_within_gives_the_weights_back(tiny_base, start, tmp_path):
    module = from_start(tiny_base, start, tmp_path)
    module.configure_model()
    before = trained_weights(module)
    with pytest.raises(RuntimeError, match="power cut"), module.reference.active(module, module.adapter):
        raise RuntimeError("power cut")
    after = trained_weights(module)
    assert all(before[name] is after[name] for name in before)


@pytest.mark.parametrize("name", ["orpo", "simpo"])
def test_no_copy_is_kept_where_there_is_no_reference(tiny_base, start, tmp_path, name):
    module = from_start(tiny_base, start, tmp_path, objective={"name": name})
    module.configure_model()
    assert module.reference.state_dict() == {}


def test_a_random_start_is_its_own_reference(tiny_base):
    module = small(tiny_base, {"init_lora_weights": False})
    module.configure_model()
    assert module.reference.state_dict().keys() == trained_weights(module).keys()


# ---------------------------------------------------------------- checkpoints


PLACES = ["0 5", "0 0", "0 3", "0 7", "1 1", "0 3 validated"]


class SaveEach(pl.Callback):
    """A checkpoint after some micro-batches, by epoch and index, and after a validation."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._save(trainer, f"{trainer.current_epoch} {batch_idx}")

    def on_validation_end(self, trainer, pl_module):
        self._save(trainer, f"{trainer.current_epoch} {trainer.fit_loop.epoch_loop.batch_idx} validated")

    def _save(self, trainer, place: str) -> None:
        if place in PLACES:
            trainer.save_checkpoint(self.folder / f"{place}.ckpt")


def fit(module, folder, *callbacks, ckpt=None, batches=BATCHES, **options):
    """Return what is trained, and the metrics of the last validation."""
    pl.seed_everything(3, verbose=False)
    options = {"max_epochs": 2, "accumulate_grad_batches": 3, "val_check_interval": 4} | options
    trainer = synthetic.trainer(folder, callbacks=list(callbacks), num_sanity_val_steps=0, **options)
    loaders = synthetic.FromProgress(batches, trainer), synthetic.loader(batches[:2])
    trainer.fit(module, *loaders, ckpt_path=ckpt, weights_only=True)
    metrics = [value.item() for name, value in sorted(trainer.callback_metrics.items()) if name.startswith("val/")]
    return {name: p.detach().clone() for name, p in trained_weights(module).items()}, metrics


def test_a_restart_ends_in_the_same_bits_without_the_file_that_the_run_started_from(tiny_base, start, tmp_path):
    module = from_start(tiny_base, start, tmp_path)
    final, metrics = fit(module, tmp_path, SaveEach(tmp_path))
    reference = module.reference.state_dict()
    (tmp_path / "start.ckpt").unlink()
    for place in PLACES if start[1] == {} else PLACES[:1]:
        again = small(tiny_base, {**start[1], "init_from": str(tmp_path / "start.ckpt")})
        resumed, same = fit(again, tmp_path, ckpt=tmp_path / f"{place}.ckpt")
        assert all(torch.equal(resumed[name], final[name]) for name in final)
        assert same == metrics
        assert all(torch.equal(tensor, reference[name]) for name, tensor in again.reference.state_dict().items())
        assert again.reference.fingerprint == module.reference.fingerprint


def test_a_restart_needs_no_folder_of_peft_either(tiny_base, tmp_path):
    form = synthetic.randomised(small(tiny_base)).adapter.to_peft()
    form.config.save_pretrained(tmp_path / "adapter")
    save_file(form.tensors, tmp_path / "adapter/adapter_model.safetensors")
    lora = {"init_from": str(tmp_path / "adapter")}
    final, _ = fit(small(tiny_base, lora), tmp_path, SaveEach(tmp_path))
    shutil.rmtree(tmp_path / "adapter")
    module = small(tiny_base, lora)
    module.check_base(restored=True)
    resumed, _ = fit(module, tmp_path, ckpt=tmp_path / "0 5.ckpt")
    assert all(torch.equal(resumed[name], final[name]) for name in final)


@pytest.mark.parametrize("name", ["dpo", "ipo", "orpo", "simpo", "kto"])
def test_a_fresh_adapter_restarts_to_the_same_bits(tiny_base, tmp_path, name):
    """KTO's baseline is a micro-batch's, and a restart begins with a whole one."""
    options = {"objective": {"name": name}}
    batches = LABELLED if name == "kto" else BATCHES
    final, metrics = fit(small(tiny_base, **options), tmp_path, SaveEach(tmp_path), batches=batches)
    for place in PLACES[:3] if name == "dpo" else PLACES[:1]:
        again = small(tiny_base, **options)
        resumed, same = fit(again, tmp_path, ckpt=tmp_path / f"{place}.ckpt", batches=batches)
        assert all(torch.equal(resumed[name], final[name]) for name in final)
        assert same == metrics


def test_training_moves_neither_the_base_nor_the_reference(tiny_base, start, tmp_path):
    module = from_start(tiny_base, start, tmp_path)
    module.configure_model()
    frozen = {name: p.clone() for name, p in module.named_parameters() if not p.requires_grad}
    reference = {name: tensor.clone() for name, tensor in module.reference.state_dict().items()}
    trained = {name: p.detach().clone() for name, p in trained_weights(module).items()}
    assert all(torch.equal(reference[name], trained[name]) for name in trained)
    final, _ = fit(module, tmp_path)
    assert all(torch.equal(p, frozen[name]) for name, p in module.named_parameters() if name in frozen)
    assert all(torch.equal(tensor, reference[name]) for name, tensor in module.reference.state_dict().items())
    assert not all(torch.equal(final[name], trained[name]) for name in trained)


@pytest.fixture
def checkpoint(tiny_base, start, tmp_path) -> dict:
    fit(from_start(tiny_base, start, tmp_path), tmp_path, SaveEach(tmp_path), max_epochs=1)
    return torch.load(tmp_path / "0 7.ckpt", weights_only=True)


def test_a_checkpoint_keeps_the_reference_apart_from_what_is_trained(tiny_base, start, tmp_path, checkpoint):
    started = torch.load(start[0], weights_only=True)["state_dict"]
    assert checkpoint[REFERENCE].keys() == checkpoint["state_dict"].keys() == started.keys()
    assert all(torch.equal(tensor, started[name]) for name, tensor in checkpoint[REFERENCE].items())
    assert checkpoint[IDENTITY]["objective"] == "dpo"
    assert len(checkpoint[IDENTITY][REFERENCE]) == 64


def test_a_loaded_module_measures_against_the_run_s_reference(tiny_base, start, tmp_path, checkpoint):
    module = Phi3LoRAModule.load_from_checkpoint(tmp_path / "0 7.ckpt", weights_only=True).eval()
    other = from_start(tiny_base, start, tmp_path)
    other.configure_model()
    assert torch.equal(by_reference(module), losses(other.eval()))
    assert not torch.equal(by_reference(module), losses(module))


MUTATIONS = {
    "a missing tensor": (lambda state: dict([*state.items()][1:]), "missing model"),
    "a foreign tensor": (lambda state: state | {"x": torch.zeros(1)}, "unexpected x"),
    "another value": (lambda state: {name: tensor * 1.5 for name, tensor in state.items()}, "not as it was written"),
    "none at all": (lambda state: {}, "missing model"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_reference_that_is_not_as_it_was_written_is_refused(tiny_base, start, tmp_path, checkpoint, mutation):
    mutate, told = MUTATIONS[mutation]
    torch.save(checkpoint | {REFERENCE: mutate(checkpoint[REFERENCE])}, tmp_path / "mutated.ckpt")
    with pytest.raises(CheckpointError, match=told):
        fit(small(tiny_base, start[1]), tmp_path, ckpt=tmp_path / "mutated.ckpt")


def test_another_objective_is_another_run(tiny_base, start, tmp_path):
    module = small(tiny_base, start[1])
    with pytest.raises(CheckpointError, match=r"model\.objective\.name is dpo and was supervised .*lora\.init_from"):
        fit(module, tmp_path, ckpt=start[0])


def test_an_evaluation_of_a_supervised_checkpoint_measures_against_its_own_start(tiny_base, start, tmp_path):
    """No reference is in the checkpoint, and what init_from names is one that is read."""
    module = from_start(tiny_base, start, tmp_path)
    options = {"ckpt_path": start[0], "weights_only": True, "verbose": False}
    (metrics,) = synthetic.trainer(tmp_path).validate(module, synthetic.loader([BATCH]), **options)
    assert metrics["val/preference_accuracy"] == 0.5
    (tmp_path / "start.ckpt").unlink()
    module = small(tiny_base, {**start[1], "init_from": str(tmp_path / "start.ckpt")})
    with pytest.raises(CheckpointError, match=r"^model\.lora\.init_from: .*start\.ckpt"):
        synthetic.trainer(tmp_path).validate(module, synthetic.loader([BATCH]), **options)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_averaged_weights_leave_the_reference_alone(tiny_base, start, tmp_path):
    module = from_start(tiny_base, start, tmp_path)
    module.configure_model()
    reference = copy.deepcopy(module.reference.state_dict())
    first = EMAWeightAveraging(decay=0.7)
    final, metrics = fit(module, tmp_path, first, SaveEach(tmp_path))
    assert all(torch.equal(tensor, reference[name]) for name, tensor in module.reference.state_dict().items())
    again = small(tiny_base, start[1])
    resumed, same = fit(again, tmp_path, EMAWeightAveraging(decay=0.7), ckpt=tmp_path / "0 5.ckpt")
    assert all(torch.equal(resumed[name], final[name]) for name in final)
    assert same == metrics
