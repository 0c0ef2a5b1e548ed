"""Loss, gradient and rewards against TRL's own trainers, on the same ids and the same adapter, in float32."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, Phi3ForCausalLM

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.model.loss import cross_entropy

pytest.importorskip("trl", minversion="1.16", reason="no trl: the extra bench is not installed")

# TRL gives the Trainer what transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

TINY = str(Path(__file__).parents[2] / "src/phi3_lightning/assets/tiny_phi3")
EPSILON = torch.finfo(torch.float32).eps
PAIRS = [synthetic.pair(4 + 5 * seed % 17, 2 + 3 * seed % 7, 1 + 5 * seed % 8, seed) for seed in range(6)]
LABELS = [True, False, True, True, False, False]
LONGEST = max(len(ids) for pair in PAIRS for ids, _ in pair)
VOCABULARY = 1024

# a log-probability is a float32 sum of up to 8 tokens of about 7 nats, each from a log-sum of 1,024 exponentials of
# products of 192 terms, through four layers; a loss stretches differences of them by beta, or less
LOGPS = 8 * 7 * (4 * 192) ** 0.5 * EPSILON
GRADIENT = (VOCABULARY + 12 * LONGEST) * EPSILON


def moved(objective: dict, folder: Path) -> Phi3LoRAModule:
    """A module whose run began from an adapter, and has made all answers likelier since."""
    options = {"dtype": "float32", "gradient_checkpointing": "none"}
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["qkv_proj", "down_proj"]}
    first = synthetic.randomised(Phi3LoRAModule(TINY, lora=lora, **options), std=0.05)
    form = first.adapter.to_peft()
    form.config.base_model_name_or_path = TINY
    form.config.save_pretrained(folder)
    save_file(form.tensors, folder / "adapter_model.safetensors")
    module = Phi3LoRAModule(TINY, lora=lora | {"init_from": str(folder)}, objective=objective, **options)
    module.configure_model()
    batch = synthetic.batch_of([[document for pair in PAIRS for document in pair]])
    for _ in range(5):
        total, _ = cross_entropy(module(batch), module.head, batch)
        gradients = torch.autograd.grad(total, list(module.trained_parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(module.trained_parameters(), gradients, strict=True):
                parameter -= 0.01 * gradient.sign()
    return module


def learn(module: Phi3LoRAModule, batch) -> tuple[float, dict[str, Tensor]]:
    """Mean loss, and the gradient by PEFT's names."""
    module.model.train()
    total, weight = module.compute_loss(module(batch), module.head, batch)
    (total / weight).backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    return (total / weight).item(), {f"base_model.{name}": gradient for name, gradient in gradients.items()}


def peft_model(module: Phi3LoRAModule, folder: Path) -> PeftModel:
    base = Phi3ForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder, is_trainable=True)


def take_weights(model: PeftModel, module: Phi3LoRAModule) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameters[f"base_model.{name}"].copy_(parameter)


def compare(module: Phi3LoRAModule, batch, loss: Tensor, model: torch.nn.Module, stretch: float) -> None:
    """Compare loss and gradient.

    Args:
        stretch: By how much a difference of log-probabilities changes the loss at most.
    """
    own_loss, own = learn(module, batch)
    loss.backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert own.keys() == theirs.keys()
    assert own_loss == pytest.approx(loss.item(), abs=LOGPS * stretch)
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    for name, gradient in own.items():
        assert (gradient - theirs[name]).abs().max().item() <= GRADIENT * largest, name


def rewards(module: Phi3LoRAModule) -> tuple[float, float]:
    chosen, rejected = module._scores
    return chosen.rewards.mean().item(), rejected.rewards.mean().item()


def split(document) -> tuple[list[int], list[int]]:
    ids, labels = document
    at = labels.count(-100)
    return ids[:at], ids[at:]


PAIRWISE = {
    "dpo": ({"name": "dpo", "beta": 0.3}, {"loss_type": ["sigmoid"], "beta": 0.3}, 0.3),
    "dpo with flipped labels": (
        {"name": "dpo", "label_smoothing": 0.1},
        {"loss_type": ["robust"], "beta": 0.1, "label_smoothing": 0.1},
        0.125,
    ),
    "ipo": ({"name": "ipo", "beta": 0.2}, {"loss_type": ["ipo"], "beta": 0.2}, 2 * 5),
}


@pytest.mark.parametrize("case", PAIRWISE)
def test_pairs_against_a_copy_of_the_adapter(tmp_path, case):
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    objective, options, stretch = PAIRWISE[case]
    module = moved(objective, tmp_path)
    model = peft_model(module, tmp_path)
    args = DPOConfig(
        str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, **options
    )
    dummy = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    trainer = DPOTrainer(
        model, args=args, train_dataset=dummy, processing_class=AutoTokenizer.from_pretrained(TINY)
    )  # keeps a copy of the adapter as its reference
    take_weights(model, module)
    rows = [dict(zip(("prompt_ids", "chosen_ids"), split(pair[0]), strict=True)) for pair in PAIRS]
    rows = [row | {"rejected_ids": split(pair[1])[1]} for row, pair in zip(rows, PAIRS, strict=True)]
    loss = trainer._compute_loss(trainer.model, DataCollatorForPreference(pad_token_id=0)(rows), False)
    compare(module, synthetic.pairs_of([PAIRS[:4], PAIRS[4:]]), loss, trainer.model, stretch)
    theirs = [trainer._metrics["train"][f"rewards/{side}"][0] for side in ("chosen", "rejected")]
    assert rewards(module) == pytest.approx(theirs, abs=LOGPS * options["beta"])
    assert max(map(abs, theirs)) > 100 * LOGPS  # the run has moved


def test_labelled_answers_against_a_copy_of_the_adapter(tmp_path):
    from trl import KTOConfig, KTOTrainer
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.75}
    module = moved({"name": "kto", "beta": 0.3, **weights}, tmp_path)
    model = peft_model(module, tmp_path)
    plain = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
    args = KTOConfig(str(tmp_path / "trl"), beta=0.3, **plain, **weights)
    dummy = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["b", "c"], "label": [True, False]})
    trainer = KTOTrainer(model, args=args, train_dataset=dummy, processing_class=AutoTokenizer.from_pretrained(TINY))
    take_weights(model, module)
    documents = [pair[0] for pair in PAIRS]
    parts = [split(document) for document in documents]
    rows = [
        {"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": parts[index - 1][1], "label": label}
        for index, ((prompt, answer), label) in enumerate(zip(parts, LABELS, strict=True))
    ]
    collator = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=max(len(ids) for ids, _ in documents))
    loss = trainer._compute_loss(trainer.model, collator(rows), False)
    batch = synthetic.labelled_of([documents[:4], documents[4:]], [LABELS[:4], LABELS[4:]])
    compare(module, batch, loss, trainer.model, 0.3 * 1.5)
    theirs = [trainer._metrics["train"][f"rewards/{side}"][0] for side in ("chosen", "rejected")]
    assert rewards(module) == pytest.approx(theirs, abs=LOGPS * 0.3)
    assert trainer._metrics["train"]["kl"][0] > 0  # the baseline counts


def logps(trainer: type, model: PeftModel, documents) -> Tensor:
    """Mean log-probabilities, as TRL computes them from padded rows."""
    batch = synthetic.batch_of([[document] for document in documents])
    mask = (torch.arange(batch["input_ids"].shape[1]) < torch.tensor(batch["document_lengths"])).long()
    logits = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits
    return trainer.get_batch_logps(logits, batch["labels"], average_log_prob=True)


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_pairs_without_a_reference(tmp_path, monkeypatch, name):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    options = {"beta": 2.0, "simpo_gamma": 0.7} if name == "simpo" else {"beta": 0.3}
    module = moved({"name": name, **options}, tmp_path)
    model = peft_model(module, tmp_path)
    take_weights(model, module)
    trainer = CPOTrainer if name == "simpo" else ORPOTrainer
    chosen, rejected = (logps(trainer, model, [pair[side] for pair in PAIRS]) for side in (0, 1))
    this = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"), alpha=0.0, label_smoothing=0.0, loss_type=name, **options
    )
    if name == "simpo":
        losses, *scores = CPOTrainer.cpo_loss(this, chosen, rejected)
        loss = losses.mean()
    else:
        ratios, *scores = ORPOTrainer.odds_ratio_loss(this, chosen, rejected)[:3]
        loss = -chosen.mean() - ratios.mean()  # TRL's own likelihood term takes prompts in
    compare(module, synthetic.pairs_of([PAIRS[:4], PAIRS[4:]]), loss, model, 4.0)
    expected = [each.mean().item() for each in scores[:2]]
    assert rewards(module) == pytest.approx(expected, abs=LOGPS * options["beta"])
