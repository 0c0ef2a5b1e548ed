"""Phi3LoRAModule on preferences: what it learns from, the gradient of a window, the metrics."""

import math

import lightning.pytorch as pl
import pytest
import torch

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.batch import IGNORE_INDEX
from phi3_lightning.config.objective import USED
from phi3_lightning.errors import ConfigError
from phi3_lightning.model.loss import cross_entropy

EPSILON = torch.finfo(torch.float32).eps
PAIRS = [synthetic.pair(3 + 5 * seed % 17, 2 + 3 * seed % 7, 1 + 5 * seed % 8, seed) for seed in range(6)]
GOOD = [True, False, False, True, True, False]
OBJECTIVES = {
    "dpo": {"name": "dpo"},
    "dpo with more": {"name": "dpo", "beta": 0.4, "label_smoothing": 0.1, "sft_weight": 0.5},
    "ipo": {"name": "ipo"},
    "orpo": {"name": "orpo"},
    "simpo": {"name": "simpo", "beta": 2.0},
}


def small(base, objective, **options) -> Phi3LoRAModule:
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **options.pop("lora", {})}
    options = {"dtype": "float32", "optimizer": {"lr": 1e-2}, "gradient_checkpointing": "none"} | options
    return Phi3LoRAModule(base, lora=lora, objective=objective, **options)


def labelled(documents=tuple(pair[0] for pair in PAIRS), good=tuple(GOOD), size: int = 6, **options) -> list:
    rows = list(zip(documents, good, strict=True))
    return [
        synthetic.labelled_of([[document] for document, _ in part], [[label] for _, label in part], start, **options)
        for start, part in ((start, rows[start : start + size]) for start in range(0, len(rows), size))
    ]


def data(name: str) -> list:
    if name == "supervised":
        return [synthetic.batch_of([[document for pair in PAIRS for document in pair]])]
    return labelled() if name == "kto" else [synthetic.pairs_of([PAIRS])]


class Watch(pl.Callback):
    """The gradient of each optimiser step."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in pl_module.trained_parameters()]))


def window(base, folder, objective, batches, likelier=(), **options) -> tuple[torch.Tensor, dict[str, float]]:
    """Gradient and metrics of one window over the batches, of which the documents ``likelier`` were learnt before."""
    module = synthetic.randomised(small(base, objective, **options))
    for document in 20 * list(likelier):
        batch = synthetic.batch_of([[document]])
        total, count = cross_entropy(module(batch), module.head, batch)
        gradients = torch.autograd.grad(total / count, list(module.trained_parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(module.trained_parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    watch = Watch()
    trainer = synthetic.trainer(folder, callbacks=[watch], accumulate_grad_batches=len(batches), max_steps=1)
    trainer.fit(module, synthetic.loader(batches))
    (gradient,) = watch.gradients
    return gradient, {name: value.item() for name, value in trainer.callback_metrics.items()}


# ---------------------------------------------------------------- what it learns from

KINDS = {"supervised": "chats", "kto": "answers with a label"}


@pytest.mark.parametrize("name", USED)
@pytest.mark.parametrize("other", USED)
def test_rows_of_another_kind_are_refused_with_the_objective_that_learns_from_them(tiny_base, name, other):
    module = small(tiny_base, {"name": name})
    module.configure_model()
    (batch,) = data(other)
    own, theirs = (KINDS.get(each, "pairs") for each in (name, other))
    if own == theirs:
        total, _ = module.compute_loss(module(batch), module.head, batch)
        assert total.isfinite()
        return
    told = rf"^model\.objective\.name: '{name}' cannot be used: it learns from {own}, and the rows of data are {theirs}"
    with pytest.raises(ConfigError, match=told + rf"; give it such rows, or set .*{other}"):
        module.compute_loss(module(batch), module.head, batch)


@pytest.mark.parametrize("name", USED)
def test_a_filler_batch_has_no_weight_and_a_zero_gradient(tiny_base, name):
    module = synthetic.randomised(small(tiny_base, {"name": name}))
    batch = synthetic.batch_of([[]])
    total, weight = module.compute_loss(module(batch), module.head, batch)
    assert (total.item(), weight.item()) == (0, 0)
    total.backward()
    assert all(not parameter.grad.any() for parameter in module.trained_parameters())


# ---------------------------------------------------------------- the gradient of a window

SPLITS = {
    "one row a pair": lambda: [synthetic.pairs_of([[pair] for pair in PAIRS], pad=7)],
    "rows of two and four": lambda: [synthetic.pairs_of([PAIRS[:2], PAIRS[2:]])],
    "a micro-batch a pair": lambda: [synthetic.pairs_of([[pair]], index) for index, pair in enumerate(PAIRS)],
    "uneven micro-batches and a filler": lambda: [
        synthetic.pairs_of([PAIRS[:1]]),
        synthetic.batch_of([[]]),
        synthetic.pairs_of([[pair] for pair in PAIRS[1:]], 1),
    ],
    "another order": lambda: [synthetic.pairs_of([PAIRS[::-1]])],
}


def close(found: torch.Tensor, expected: torch.Tensor, documents: int = 12) -> bool:
    """Float32 sums of at most 40 tokens of 12 documents in another order, through two layers and a loss of each."""
    return bool((found - expected).abs().max() <= 40 * documents * EPSILON * expected.abs().max())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_split_of_a_window_gives_one_gradient_and_the_same_metrics(tmp_path, tiny_base, objective):
    packed, metrics = window(tiny_base, tmp_path, OBJECTIVES[objective], [synthetic.pairs_of([PAIRS])])
    assert {"train/loss", "train/preference_accuracy", "train/ranking_accuracy"} <= metrics.keys()
    for name, split in SPLITS.items():
        gradient, again = window(tiny_base, tmp_path, OBJECTIVES[objective], split())
        assert close(gradient, packed), name
        assert again == pytest.approx(metrics, rel=1e-4, abs=1e-5), name


def test_rows_do_not_matter_to_kto_whose_micro_batches_do(tmp_path, tiny_base):
    documents = [pair[0] for pair in PAIRS]
    objective = {"name": "kto", "desirable_weight": 1.5}
    (padded,) = labelled(pad=7)
    expected, metrics = window(tiny_base, tmp_path, objective, [padded], documents)
    packed, same = window(tiny_base, tmp_path, objective, [synthetic.labelled_of([documents], [GOOD])], documents)
    assert close(packed, expected)
    assert same == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    # a micro-batch has a baseline of its own
    parts, other = window(tiny_base, tmp_path, objective, labelled(size=2), documents)
    assert not close(parts, expected)
    assert other["train/ranking_accuracy"] == pytest.approx(metrics["train/ranking_accuracy"])


def test_the_mean_is_over_pairs_and_not_over_tokens(tmp_path, tiny_base):
    whole, _ = window(tiny_base, tmp_path, {"name": "dpo"}, [synthetic.pairs_of([PAIRS])])
    singles = [window(tiny_base, tmp_path, {"name": "dpo"}, [synthetic.pairs_of([[pair]])])[0] for pair in PAIRS]
    assert close(torch.stack(singles).mean(0), whole)


def test_a_change_of_the_rejected_answer_moves_the_loss_and_a_change_of_the_padding_does_not(tiny_base):
    module = synthetic.randomised(small(tiny_base, {"name": "dpo"}))

    def loss_of(batch) -> float:
        with torch.no_grad():
            return module.compute_loss(module(batch), module.head, batch)[0].item()

    before = loss_of(synthetic.pairs_of([[pair] for pair in PAIRS], pad=0))
    assert loss_of(synthetic.pairs_of([[pair] for pair in PAIRS], pad=9)) == before
    for places in ("last supervised", "prompt"):
        batch = synthetic.pairs_of([[pair] for pair in PAIRS])
        (length, other), shared = batch["document_lengths"][0], batch["shared_lengths"][0][1]
        at = length + other - 1 if places == "last supervised" else length + shared
        batch["input_ids"][0, at] += 1
        batch["labels"][0, at] += places == "last supervised"
        assert loss_of(batch) != before


# ---------------------------------------------------------------- the prompt once


@pytest.mark.parametrize("backend", ["peft", "loralib"])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_shared_prompts_change_neither_loss_nor_gradient(tmp_path, tiny_base, backend, checkpointing):
    options = {"lora": {"backend": backend}, "gradient_checkpointing": checkpointing}
    batch = synthetic.pairs_of([PAIRS])
    # the field says that these are pairs; without shared tokens all is computed
    apart = batch | {"shared_lengths": [[0] * len(row) for row in batch["shared_lengths"]]}
    once, metrics = window(tiny_base, tmp_path, {"name": "dpo"}, [batch], **options)
    twice, expected = window(tiny_base, tmp_path, {"name": "dpo"}, [apart], **options)
    assert close(once, twice)
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("as_on_a_gpu")
def test_compiled_layers_compute_shared_prompts_beside_a_copied_reference(tmp_path, tiny_base):
    batches = [synthetic.pairs_of([PAIRS[:3]]), synthetic.pairs_of([PAIRS[3:]], 3)]
    gradients = []
    for mode in ("layers", "none"):
        torch.manual_seed(0)  # of the random start, which is the reference
        options = {"torch_compile": mode, "lora": {"init_lora_weights": False}}
        gradients.append(window(tiny_base, tmp_path, {"name": "dpo"}, batches, **options)[0])
    assert close(*gradients)


# ---------------------------------------------------------------- metrics

NAMES = ("loss", "preference_accuracy", "ranking_accuracy", "reward_margin", "chosen_logp", "rejected_logp")


def logps_by_transformers(module, documents) -> tuple[list[float], list[float]]:
    """Sum and mean of the log-probabilities of each document's supervised tokens, with full logits."""
    sums, means = [], []
    for ids, labels in documents:
        with torch.no_grad():
            logps = module.model(torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
        places = [at for at, label in enumerate(labels[1:]) if label != IGNORE_INDEX]
        own = torch.stack([logps[at, labels[at + 1]] for at in places]).double()
        sums.append(own.sum().item())
        means.append(own.mean().item())
    return sums, means


@pytest.mark.parametrize("stage", ["val", "test", "train"])
@pytest.mark.parametrize("size", [1, 4, 6])
def test_metrics_are_those_of_all_pairs(tmp_path, tiny_base, stage, size):
    module = synthetic.randomised(small(tiny_base, {"name": "dpo", "beta": 0.3}), std=0.2)
    policy = [logps_by_transformers(module, [pair[side] for pair in PAIRS]) for side in (0, 1)]
    with module.base_answers():
        base = [logps_by_transformers(module, [pair[side] for pair in PAIRS])[0] for side in (0, 1)]
    rewards = [[0.3 * (p - b) for p, b in zip(policy[side][0], base[side], strict=True)] for side in (0, 1)]
    margins = [chosen - rejected for chosen, rejected in zip(*rewards, strict=True)]
    expected = {
        "loss": sum(math.log1p(math.exp(-margin)) for margin in margins) / 6,
        "preference_accuracy": sum(margin > 0 for margin in margins) / 6,
        "ranking_accuracy": sum(c > r for c, r in zip(policy[0][1], policy[1][1], strict=True)) / 6,
        "reward_margin": sum(margins) / 6,
        "chosen_logp": sum(policy[0][0]) / 6,
        "rejected_logp": sum(policy[1][0]) / 6,
    }
    batches = [synthetic.pairs_of([[pair] for pair in PAIRS[at : at + size]], at) for at in range(0, 6, size)]
    trainer = synthetic.trainer(tmp_path, accumulate_grad_batches=len(batches))
    if stage == "train":
        trainer.fit(module, synthetic.loader(batches))
    else:
        run = trainer.validate if stage == "val" else trainer.test
        run(module, synthetic.loader(batches), verbose=False)
    found = {name: trainer.callback_metrics[f"{stage}/{name}"].item() for name in NAMES}
    assert found == pytest.approx(expected, rel=1e-4)
    assert not any("perplexity" in name or "token_accuracy" in name for name in trainer.callback_metrics)


def test_a_fresh_adapter_ties_with_its_reference(tmp_path, tiny_base):
    trainer = synthetic.trainer(tmp_path)
    (metrics,) = trainer.validate(small(tiny_base, {"name": "dpo"}), synthetic.loader(data("dpo")), verbose=False)
    assert metrics["val/loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert (metrics["val/preference_accuracy"], metrics["val/reward_margin"]) == (0.5, 0)


@pytest.mark.parametrize("name", [name for name in USED if name != "supervised"])
def test_each_objective_learns_its_pairs(tmp_path, tiny_base, name):
    module = small(tiny_base, {"name": name}, schedule={"name": "constant", "warmup": 0})
    batches = data(name)
    trainer = synthetic.trainer(tmp_path, max_epochs=30)
    trainer.fit(module, synthetic.loader(batches))
    (metrics,) = trainer.validate(module, synthetic.loader(batches), verbose=False)
    assert metrics["val/ranking_accuracy"] == 1
    assert metrics["val/preference_accuracy"] > 0.9
    assert metrics["val/reward_margin"] > 0


def test_training_metrics_are_of_one_window_each(tmp_path, tiny_base):
    class Logged(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            logged.append(trainer.callback_metrics["train/chosen_logp"].item())

    logged: list[float] = []
    batches = [synthetic.pairs_of([[pair]], index) for index, pair in enumerate(PAIRS)]
    module = small(tiny_base, {"name": "dpo"}, optimizer={"lr": 1e-12})
    synthetic.trainer(tmp_path, callbacks=[Logged()]).fit(module, synthetic.loader(batches))
    expected, _ = logps_by_transformers(module.eval(), [pair[0] for pair in PAIRS])
    assert logged == pytest.approx(expected, rel=1e-5)


class OwnLoss(Phi3LoRAModule):
    """A loss of another project: sum and number of the rejected answers' tokens."""

    def compute_loss(self, hidden, head, batch):
        logits = head(hidden)
        return logits.float().square().mean(), 1.0


def test_a_loss_of_a_subclass_works_as_before(tmp_path, tiny_base):
    module = OwnLoss(tiny_base, dtype="float32", objective={"name": "dpo"})
    trainer = synthetic.trainer(tmp_path)
    trainer.fit(module, synthetic.loader(data("dpo")), synthetic.loader(data("dpo")))
    assert {"train/loss", "val/loss"} <= trainer.callback_metrics.keys()
    assert not any("preference" in name for name in trainer.callback_metrics)
