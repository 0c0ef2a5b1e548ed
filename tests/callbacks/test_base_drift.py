"""Drift of the tuned model from its base, against plain probabilities."""

import json

import lightning.pytorch as pl
import pytest
import torch

import synthetic
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.batch import IGNORE_INDEX
from phi3_lightning.callbacks import BaseDrift, base_drift
from phi3_lightning.callbacks.monitor import GENERAL

DOCUMENTS = [synthetic.document(length, length // 2, length) for length in (6, 21, 9, 14, 30)]
TRAIN = [synthetic.batch_of([[synthetic.document(8, 4, seed)]]) for seed in range(2)]


class General(pl.LightningDataModule):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def val_dataloader(self):
        rows = [[document] for document in DOCUMENTS]
        return synthetic.loader([synthetic.batch_of(rows[i : i + self.size]) for i in range(0, len(rows), self.size)])


def small(base, **options) -> Phi3LoRAModule:
    return Phi3LoRAModule(base, **{"dtype": "float32", "lora": {"r": 4, "lora_dropout": 0.0}} | options)


def measured(folder, module, size=2) -> dict[str, float]:
    trainer = synthetic.trainer(folder, callbacks=[BaseDrift(General(size))])
    (found,) = trainer.validate(module, synthetic.loader(TRAIN), verbose=False)
    return {name: value for name, value in found.items() if name.startswith("base_drift/")}


def plain(module) -> dict[str, float]:
    """Row by row, from all logits at once."""
    model, sums = module.loaded_model.eval(), torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        for ids, labels in DOCUMENTS:
            ids, labels = torch.tensor([ids]), torch.tensor(labels[1:])
            tuned = model(input_ids=ids, use_cache=False).logits[0, :-1].double().softmax(-1)
            with module.base_answers():
                base = model(input_ids=ids, use_cache=False).logits[0, :-1].double().softmax(-1)
            for at in (labels != IGNORE_INDEX).nonzero()[:, 0]:
                divergence = (tuned[at] * (tuned[at] / base[at]).log()).sum()
                losses = [-p[at, labels[at]].log() for p in (tuned, base)]
                sums += torch.stack([divergence, *losses, torch.ones((), dtype=torch.float64)])
    kl, tuned_loss, base_loss = (sums[:3] / sums[3]).tolist()
    return {"base_drift/kl": kl, "base_drift/loss": tuned_loss, "base_drift/loss_change": tuned_loss - base_loss}


TARGETS = {"layers": ["qkv_proj", "down_proj"], "head": ["qkv_proj", "lm_head"]}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_drift_is_the_kl_divergence_of_plain_probabilities(tmp_path, tiny_base, targets):
    lora = {"r": 4, "lora_dropout": 0.0, "target_modules": targets}
    module = synthetic.randomised(small(tiny_base, lora=lora), std=0.3)
    expected = plain(module)
    assert expected["base_drift/kl"] > 0.01
    # float32 logits of size 1, and losses of size 5
    assert measured(tmp_path, module) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_drift_is_the_divergence_of_tuned_from_base(tmp_path, tiny_base):
    """KL is not symmetric: the other direction is another number."""
    module = synthetic.randomised(small(tiny_base), std=0.3)
    model = module.loaded_model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids, labels in DOCUMENTS:
            kept = torch.tensor(labels[1:]) != IGNORE_INDEX
            tuned = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1][kept].log_softmax(-1)
            with module.base_answers():
                base = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1][kept].log_softmax(-1)
            total += (base.exp() * (base - tuned)).sum().item()
            tokens += int(kept.sum())
    assert measured(tmp_path, module)["base_drift/kl"] != pytest.approx(total / tokens, rel=1e-3)


def test_a_fresh_adapter_has_no_drift(tmp_path, tiny_base):
    module = small(tiny_base)
    module.configure_model()
    found = measured(tmp_path, module)
    assert found["base_drift/kl"] == found["base_drift/loss_change"] == 0


def test_neither_batches_nor_chunks_change_it(tmp_path, tiny_base, monkeypatch):
    module = synthetic.randomised(small(tiny_base), std=0.3)
    expected = measured(tmp_path, module, size=1)
    monkeypatch.setattr(base_drift, "CHUNK", 3)
    # padding to another width moves float32 logits by some roundings
    assert measured(tmp_path, module, size=5) == pytest.approx(expected, rel=1e-4)


def test_each_validation_measures_drift_without_changing_training(tmp_path, tiny_base):
    def trained(*callbacks):
        pl.seed_everything(1, verbose=False)
        module = small(tiny_base, optimizer={"lr": 1e-2}, lora={"r": 4, "lora_dropout": 0.2})
        trainer = synthetic.trainer(tmp_path, callbacks=list(callbacks), max_epochs=2)
        trainer.fit(module, synthetic.loader(TRAIN), synthetic.loader(TRAIN))
        return trainer.callback_metrics, list(module.trained_parameters())

    metrics, with_it = trained(BaseDrift(General(2)))
    assert metrics["base_drift/kl"] > 0
    _, without = trained()
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
    assert all(parameter.requires_grad for parameter in with_it)


def test_the_general_chats_of_the_package_are_valid(tmp_path):
    rows = [json.loads(line) for line in GENERAL.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 36
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows)
    tiny = str(GENERAL.parent / "tiny_phi3")
    data = ChatDataModule(val=str(GENERAL), tokenizer=tiny, max_length=256, cache_dir=str(tmp_path), num_workers=0)
    data.prepare_data()
    data.setup("validate")
    assert data.statistics["val"].kept == len(rows)
    assert not data.statistics["val"].dropped
