"""Phi3LoRAModule: the model it builds, its metrics and its predictions."""

import math
import os

import pytest
import torch
from lightning.pytorch.loggers import Logger
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import Phi3ForCausalLM

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.batch import IGNORE_INDEX
from phi3_lightning.errors import ConfigError, ModelError, Phi3LightningError

SUPERVISED = [1, 20, 3, 7, 25, 2, 11]
DOCUMENTS = [synthetic.document(count + 4, count, seed) for seed, count in enumerate(SUPERVISED)]
MASKED = ([5, 6, 7, 8], [IGNORE_INDEX] * 4)
STOP = [2, 4]
SMALL = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def small(base, **options) -> Phi3LoRAModule:
    return Phi3LoRAModule(base, **{"dtype": "float32", "lora": SMALL} | options)


def lora_layers(module) -> list[torch.nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, LoraLayer)]


def batches(size: int = 1, documents=DOCUMENTS) -> list:
    rows = [[document] for document in documents]
    return [synthetic.batch_of(rows[start : start + size], start) for start in range(0, len(rows), size)]


# ---------------------------------------------------------------- the model


def test_nothing_is_loaded_on_construction():
    module = Phi3LoRAModule("no/such/base")
    assert list(module.parameters()) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [("init", "Random"), ("dtype", "bf16"), ("attn_implementation", "flash"), ("gradient_checkpointing", False)],
)
def test_a_misspelt_choice_is_refused(option, value):
    with pytest.raises(ConfigError, match=rf"model\.{option}: {value!r} cannot be used: choose "):
        Phi3LoRAModule("base", **{option: value})


def test_using_the_module_before_loading_is_a_named_error(tiny_base):
    with pytest.raises(ModelError, match=r"call configure_model\(\) first"):
        small(tiny_base)(batches()[0])


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]])
def test_wrong_targets_are_refused_before_a_weight_is_read(tmp_path, targets):
    synthetic.tiny_config().save_pretrained(tmp_path)  # config.json alone
    module = small(str(tmp_path), lora={"target_modules": targets})
    for check in (module.check_base, module.configure_model):
        with pytest.raises(
            ModelError, match=r"as one matrix; set model\.lora\.backend: loralib, or name (qkv|gate_up)_proj"
        ):
            check()


def test_configuring_twice_adapts_once(tiny_base):
    module = small(tiny_base)
    module.configure_model()
    model, parameters = module.model, list(module.parameters())
    module.configure_model()
    assert module.model is model
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert len(lora_layers(module)) == 8


def test_one_process_fits_tests_and_predicts_with_one_adapter(tmp_path, tiny_base):
    module = small(tiny_base)
    trainer = synthetic.trainer(tmp_path)
    trainer.fit(module, synthetic.loader(batches(4)))
    trained = [parameter.clone() for parameter in module.trained_parameters()]
    trainer.test(module, synthetic.loader(batches(4)), verbose=False)
    trainer.predict(module, synthetic.loader([synthetic.prompt_batch([[5, 6]], STOP)]))
    assert len(lora_layers(module)) == 8
    assert all(map(torch.equal, trained, module.trained_parameters()))


def test_only_the_adapter_is_trained(tiny_base):
    module = small(tiny_base)
    module.configure_model()
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert len(trained) == 16
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert sum(entry.parameters for entry in module.coverage()) == sum(p.numel() for p in module.trained_parameters())


def test_a_loaded_base_is_used_as_it_is(tiny_base):
    base = Phi3ForCausalLM.from_pretrained(tiny_base)
    weight = base.model.embed_tokens.weight
    module = small(base)
    module.configure_model()
    assert module.model is base
    assert base.model.embed_tokens.weight is weight
    assert not weight.requires_grad


def test_a_base_with_an_adapter_is_refused_and_stays_trainable(tiny_base):
    first = small(Phi3ForCausalLM.from_pretrained(tiny_base))
    first.configure_model()
    before = {name: parameter.requires_grad for name, parameter in first.model.named_parameters()}
    with pytest.raises(ModelError, match="carries an adapter already"):
        small(first.model).configure_model()
    assert {name: parameter.requires_grad for name, parameter in first.model.named_parameters()} == before
    assert sum(before.values()) == 16


def refusals(tiny_base, folder) -> dict[str, dict]:
    """LoRA sections that a loaded base refuses: before an adapter is attached, on loading weights, and afterwards."""
    other = small(synthetic.save_tiny(folder / "other", initializer_range=0.5))
    trainer = synthetic.trainer(folder, max_steps=1)
    trainer.fit(other, synthetic.loader(batches()))
    trainer.save_checkpoint(folder / "other.ckpt", weights_only=False)
    other.adapter.to_peft().config.save_pretrained(folder / "peft")
    save_file(other.adapter.to_peft().tensors, folder / "peft/adapter_model.safetensors")
    return {
        "no such layer": {"target_modules": ["q_project"]},
        "no such file": {"init_from": str(folder / "nowhere")},
        "another rank": {"r": 2, "init_from": str(folder / "peft")},
        "another base": {"init_from": str(folder / "other.ckpt")},
    }


@pytest.mark.parametrize("name", ["no such layer", "no such file", "another rank", "another base"])
def test_a_refusal_leaves_a_loaded_base_unchanged(tiny_base, tmp_path, name):
    base = Phi3ForCausalLM.from_pretrained(tiny_base)
    base.lm_head.requires_grad_(False)
    names = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    classes = [type(module) for module in base.modules()]
    with pytest.raises(Phi3LightningError, match=r"^model\.lora\."):
        small(base, lora=SMALL | refusals(tiny_base, tmp_path)[name]).configure_model()
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == names
    assert [type(module) for module in base.modules()] == classes
    small(base).configure_model()  # the next cell of a notebook, with the mistake corrected


def test_the_base_answers_while_the_adapter_is_off(tiny_base):
    module = synthetic.randomised(small(tiny_base)).eval()
    expected = Phi3ForCausalLM.from_pretrained(tiny_base).eval()
    ids = batches()[1]["input_ids"]
    with torch.no_grad():
        adapted = module.model(ids, use_cache=False).logits
        with module.base_answers():
            plain = module.model(ids, use_cache=False).logits
        assert torch.equal(plain, expected(ids, use_cache=False).logits)
        assert not torch.equal(adapted, plain)


def test_a_local_path_is_never_recorded_as_the_name_of_a_base(tiny_base):
    assert Phi3LoRAModule(tiny_base).base_id is None
    assert Phi3LoRAModule(tiny_base, base_id="owner/name").base_id == "owner/name"
    assert Phi3LoRAModule("owner/name").base_id == "owner/name"


def test_a_document_beyond_the_context_length_is_refused(tiny_base):
    module = small(tiny_base)
    module.configure_model()
    module(synthetic.batch_of([[synthetic.document(256, 5, 0)]]))
    with pytest.raises(ConfigError, match=r"data\.max_length: a document has 257 tokens and .* reads 256"):
        module(synthetic.batch_of([[synthetic.document(257, 5, 0)]]))


# ---------------------------------------------------------------- modes and cache


class Observed(Phi3LoRAModule):
    """Records the mode of its model, and the cache it is called with."""

    def configure_model(self) -> None:
        new = self.model is None
        super().configure_model()
        if new:
            self.modes, self.caches = [], []
            self.model.model.register_forward_hook(self.observe, with_kwargs=True)

    def observe(self, _, args, kwargs, output) -> None:
        self.modes.append({layer.training for layer in self.model.modules()})
        self.caches.append((kwargs["use_cache"], output.past_key_values))

    def training_step(self, batch, batch_idx):
        self.modes.clear()
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_) -> None:
        assert self.modes == [{True}]


@pytest.mark.parametrize("before", ["nothing", "validate", "predict", "sanity check", "eval"])
def test_training_is_in_train_mode_from_the_first_step(tmp_path, tiny_base, before):
    module = Observed(tiny_base, dtype="float32", gradient_checkpointing="none")
    loader = synthetic.loader(batches(4))
    trainer = synthetic.trainer(tmp_path, val_check_interval=1)
    if before == "validate":
        trainer.validate(module, loader, verbose=False)
        assert module.modes[-1] == {False}
    if before == "predict":
        trainer.predict(module, synthetic.loader([synthetic.prompt_batch([[5, 6]], STOP)]))
    if before == "eval":
        module.configure_model()
        module.model.eval()
    trainer.fit(module, loader, loader if before == "sanity check" else None)
    assert trainer.global_step == 2


def test_no_cache_is_built_and_use_cache_of_the_config_is_unchanged(tmp_path, tiny_base):
    module = Observed(tiny_base, dtype="float32", gradient_checkpointing="none")
    synthetic.trainer(tmp_path).fit(module, synthetic.loader(batches(4)), synthetic.loader(batches(4)))
    assert set(module.caches) == {(False, None)}
    assert module.model.config.use_cache is True


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 4.0, 8.0, 12.0],
    "rope_theta": 10000.0,
}


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("first", ["validate", "predict"])
def test_longrope_trains_after_validation_in_inference_mode(tmp_path, first, checkpointing):
    base = synthetic.save_tiny(tmp_path / "base", rope_parameters=LONGROPE, original_max_position_embeddings=16)
    module = small(base, gradient_checkpointing=checkpointing)
    trainer = synthetic.trainer(tmp_path)
    data = batches(1, sorted(DOCUMENTS, key=lambda document: len(document[0])))
    loader = synthetic.loader(data)  # shorter and longer than 16 tokens, the longest last
    if first == "validate":
        trainer.validate(module, loader, verbose=False)
    else:
        trainer.predict(module, synthetic.loader([synthetic.prompt_batch([list(range(3, 40))], STOP)]))
    trainer.fit(module, loader)
    assert trainer.global_step == len(DOCUMENTS)


# ---------------------------------------------------------------- masked batches


def test_a_batch_without_labels_has_a_finite_loss_with_a_zero_gradient(tiny_base):
    module = synthetic.randomised(small(tiny_base))
    batch = synthetic.batch_of([[MASKED]])
    total, count = module.compute_loss(module(batch), module.head, batch)
    assert (total.item(), count.item()) == (0, 0)
    mean = module.weighted_mean(total, count, [0])
    assert mean.item() == 0
    gradients = torch.autograd.grad(mean, list(module.trained_parameters()))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_a_masked_batch_among_others_changes_no_training(tmp_path, tiny_base):
    results = []
    for extra in ([], [synthetic.batch_of([[MASKED]], 90)]):
        module = synthetic.randomised(small(tiny_base))
        trainer = synthetic.trainer(tmp_path, accumulate_grad_batches=3)
        trainer.fit(module, synthetic.loader([*batches(4), *extra]))
        results.append([parameter.detach().clone() for parameter in module.trained_parameters()])
    assert all(map(torch.equal, *results))


def test_a_masked_batch_among_others_changes_no_validation(tmp_path, tiny_base):
    module = synthetic.randomised(small(tiny_base))
    trainer = synthetic.trainer(tmp_path)
    (plain,) = trainer.validate(module, synthetic.loader(batches(4)), verbose=False)
    (among,) = trainer.validate(module, synthetic.loader([synthetic.batch_of([[MASKED]]), *batches(4)]), verbose=False)
    assert among == plain
    assert all(map(math.isfinite, plain.values()))


# ---------------------------------------------------------------- evaluation


def losses_by_transformers(base: str) -> tuple[float, float]:
    """Mean loss and accuracy over all supervised tokens, row by row."""
    model = Phi3ForCausalLM.from_pretrained(base)
    total, right = 0.0, 0
    for (ids, labels), count in zip(DOCUMENTS, SUPERVISED, strict=True):
        output = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), use_cache=False)
        total += output.loss.item() * count
        predicted = output.logits[0, :-1].argmax(-1)
        right += sum((predicted == torch.tensor(labels[1:])).tolist())
    return total / sum(SUPERVISED), right / sum(SUPERVISED)


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize("size", [1, 4, 7])
def test_held_out_numbers_do_not_depend_on_batch_size(tmp_path, tiny_base, size, stage):
    trainer = synthetic.trainer(tmp_path)
    run = trainer.validate if stage == "val" else trainer.test
    (metrics,) = run(small(tiny_base), synthetic.loader(batches(size)), verbose=False)
    loss, accuracy = losses_by_transformers(tiny_base)
    # float32 sums of 69 losses, each a log-sum of 97 exponentials
    tolerance = (sum(SUPERVISED) + synthetic.VOCABULARY) * torch.finfo(torch.float32).eps
    assert metrics.keys() == {f"{stage}/loss", f"{stage}/perplexity", f"{stage}/token_accuracy"}
    assert metrics[f"{stage}/loss"] == pytest.approx(loss, rel=tolerance)
    assert metrics[f"{stage}/perplexity"] == pytest.approx(math.exp(loss), rel=loss * tolerance)
    assert metrics[f"{stage}/token_accuracy"] == pytest.approx(accuracy, rel=1e-6)


class Record(Logger):
    """Records every logged value."""

    name, version = "record", 0

    def __init__(self) -> None:
        super().__init__()
        self.values: list[tuple[str, int, float]] = []

    def log_hyperparams(self, *args, **kwargs) -> None:
        pass

    def log_metrics(self, metrics, step=None) -> None:
        self.values += [(name, step, value) for name, value in metrics.items()]


def test_each_metric_is_logged_once_a_step(tmp_path, tiny_base):
    record = Record()
    trainer = synthetic.trainer(tmp_path, logger=record, log_every_n_steps=1, max_epochs=2)
    trainer.fit(small(tiny_base), synthetic.loader(batches(2)), synthetic.loader(batches(4)))
    points = [(name, step) for name, step, _ in record.values if name != "epoch"]
    assert len(points) == len(set(points))
    counts = {name: sum(other == name for other, _ in points) for name, _ in points}
    steps = 2 * len(batches(2))
    held_out = {"val/loss": 2, "val/perplexity": 2, "val/token_accuracy": 2}
    assert counts == {"train/loss": steps, "train/grad_norm": steps, "train/lr": steps} | held_out


def test_metrics_are_reset_for_each_validation(tmp_path, tiny_base):
    module = small(tiny_base)
    trainer = synthetic.trainer(tmp_path)
    trainer.validate(module, synthetic.loader(batches(7, DOCUMENTS[:3])), verbose=False)
    (again,) = trainer.validate(module, synthetic.loader(batches(7)), verbose=False)
    (alone,) = synthetic.trainer(tmp_path).validate(small(tiny_base), synthetic.loader(batches(7)), verbose=False)
    assert again == alone


# ---------------------------------------------------------------- answers


def test_predictions_are_the_answers_of_the_adapted_model(tmp_path, tiny_base):
    module = synthetic.randomised(small(tiny_base, generation={"max_new_tokens": 5}))
    prompts = synthetic.prompt_batch([[5, 6, 7], [8]], [synthetic.VOCABULARY + 1])
    (tuned,) = synthetic.trainer(tmp_path).predict(module, synthetic.loader([prompts]))
    ids = [5, 6, 7]
    with torch.no_grad():
        for _ in range(5):  # a plain greedy loop
            ids.append(module.model.eval()(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    assert tuned[0] == ids[3:]
    with module.base_answers():
        base = module.predict_step(prompts, 0)
    assert base[0] != tuned[0]


def test_dropout_follows_from_seed_and_position(tmp_path, tiny_base, monkeypatch):
    module = small(tiny_base, lora={"lora_dropout": 0.5})
    synthetic.randomised(module)
    batch = batches(7)[0]

    def loss_at(batch_idx: int, seed: int = 1) -> float:
        monkeypatch.setitem(os.environ, "PL_GLOBAL_SEED", str(seed))
        return module.training_step(batch, batch_idx).item()

    module.trainer = synthetic.trainer(tmp_path)
    assert loss_at(3) == loss_at(3)
    assert len({loss_at(3), loss_at(4), loss_at(3, seed=2)}) == 3
