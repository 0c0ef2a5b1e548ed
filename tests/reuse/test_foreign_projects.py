"""Our classes in foreign projects, and foreign classes with ours, all without the command line."""

import subprocess
import sys
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Phi3ForCausalLM

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.accumulation import TokenWeightedModule
from phi3_lightning.batch import IGNORE_INDEX, Batch
from phi3_lightning.errors import CheckpointError

DOCUMENTS = [synthetic.document(8 + 3 * seed, 4 + seed, seed) for seed in range(6)]


def small(base, kind: type = Phi3LoRAModule, **options) -> Any:
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    defaults = {
        "dtype": "float32",
        "lora": lora,
        "optimizer": {"lr": 1e-2},
        "schedule": {"name": "constant", "warmup": 0},
    }
    return kind(base, **defaults | options)


# ---------------------------------------------------------------- our module, foreign data


class TheirDataset(Dataset):
    def __len__(self) -> int:
        return len(DOCUMENTS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids, labels = DOCUMENTS[index]
        return {"ids": ids, "labels": labels, "index": index}


def their_collate(rows: list[dict]) -> Batch:
    """Pad on the right, with the keys that our module reads."""
    pad = nn.utils.rnn.pad_sequence
    ids = [torch.tensor(row["ids"]) for row in rows]
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=0),
        "labels": pad([torch.tensor(row["labels"]) for row in rows], batch_first=True, padding_value=IGNORE_INDEX),
        "position_ids": pad([torch.arange(len(row)) for row in ids], batch_first=True),
        "document_lengths": [[len(row)] for row in ids],
        "document_ids": [[row["index"]] for row in rows],
    }


class TheirDataModule(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TheirDataset(), batch_size=2, shuffle=True, collate_fn=their_collate)

    def val_dataloader(self):
        return DataLoader(TheirDataset(), batch_size=3, collate_fn=their_collate)


@pytest.mark.parametrize("argument", ["datamodule", "dataloaders"])
def test_our_module_learns_from_foreign_data(tmp_path, tiny_base, argument):
    theirs = TheirDataModule()
    given = (
        {"datamodule": theirs}
        if argument == "datamodule"
        else {"train_dataloaders": theirs.train_dataloader(), "val_dataloaders": theirs.val_dataloader()}
    )
    module = small(tiny_base)
    trainer = synthetic.trainer(tmp_path, max_epochs=4)
    (before,) = trainer.validate(module, theirs.val_dataloader(), verbose=False)
    trainer.fit(module, **given)
    assert trainer.global_step == 12
    assert trainer.callback_metrics["val/loss"].item() < before["val/loss"] - 0.1


# ---------------------------------------------------------------- our base class, a foreign loss


class TheirLoss(TokenWeightedModule):
    """A classifier of sequences that weights each row, without a language model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(synthetic.VOCABULARY, 8), nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        logits = self.head(self.embed(batch["input_ids"]).mean(1))
        targets = torch.tensor([row[0] % 3 for row in batch["document_ids"]])
        weights = torch.tensor([1.0 + row[0] for row in batch["document_ids"]])
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        return self.weighted_mean((losses * weights).sum(), weights.sum(), [row[0] for row in batch["document_ids"]])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


def test_a_foreign_loss_gets_the_same_step_for_any_split(tmp_path):
    splits = {6: 1, 1: 6, 4: 2}
    ends = []
    for size, accumulate in splits.items():
        module = TheirLoss()
        # rows of one length, so that a mean over positions does not depend on padding
        rows = [synthetic.document(10, 2, seed) for seed in range(6)]
        data = [synthetic.batch_of([[row] for row in rows[at : at + size]], at) for at in range(0, 6, size)]
        synthetic.trainer(tmp_path, accumulate_grad_batches=accumulate).fit(module, synthetic.loader(data))
        ends.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    for end in ends[1:]:
        # sums of 60 float32 terms in another order, moved by half of that
        torch.testing.assert_close(end, ends[0], rtol=0, atol=60 * torch.finfo(torch.float32).eps)
    assert not torch.allclose(ends[0], torch.cat([p.detach().flatten() for p in TheirLoss().parameters()]), atol=1e-3)


# ---------------------------------------------------------------- our module, a foreign loss


class Distilled(Phi3LoRAModule):
    """Stays near its own base: KL from the base's answers, on supervised positions."""

    def compute_loss(self, hidden, head, batch):
        with torch.no_grad(), self.base_answers():
            teacher = head(self(batch))
        supervised = batch["labels"][:, 1:] != IGNORE_INDEX
        student, teacher = head(hidden)[:, :-1][supervised], teacher[:, :-1][supervised]
        divergence = nn.functional.kl_div(
            student.float().log_softmax(-1), teacher.float().log_softmax(-1), reduction="sum", log_target=True
        )
        return divergence, supervised.sum()


def test_a_distillation_loss_pulls_the_model_back_to_its_base(tmp_path, tiny_base):
    module = synthetic.randomised(small(tiny_base, Distilled), std=0.2)
    data = [synthetic.batch_of([[document] for document in DOCUMENTS[at : at + 2]], at) for at in range(0, 6, 2)]
    trainer = synthetic.trainer(tmp_path, max_epochs=30)
    (before,) = trainer.validate(module, synthetic.loader(data), verbose=False)
    frozen = [parameter.clone() for parameter in module.parameters() if not parameter.requires_grad]
    trainer.fit(module, synthetic.loader(data))
    (after,) = trainer.validate(module, synthetic.loader(data), verbose=False)
    assert before["val/loss"] > 0.01
    assert after["val/loss"] < before["val/loss"] / 2
    assert all(map(torch.equal, frozen, (p for p in module.parameters() if not p.requires_grad)))


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_distillation_loss_has_the_gradient_of_the_plain_formula(tiny_base, checkpointing):
    module = synthetic.randomised(small(tiny_base, Distilled, gradient_checkpointing=checkpointing))
    teacher = Phi3ForCausalLM.from_pretrained(tiny_base)
    ids, labels = DOCUMENTS[2]
    batch = synthetic.batch_of([[(ids, labels)]])
    total, count = module.compute_loss(module(batch), module.head, batch)
    gradients = torch.autograd.grad(total, list(module.trained_parameters()))
    rows = [position - 1 for position, label in enumerate(labels) if label != IGNORE_INDEX]
    with torch.no_grad():
        theirs = teacher(torch.tensor([ids]), use_cache=False).logits[0, rows].softmax(-1)
    ours = module.model(torch.tensor([ids]), use_cache=False).logits[0, rows].log_softmax(-1)
    expected = (theirs * (theirs.log() - ours)).sum()
    expected_gradients = torch.autograd.grad(expected, list(module.trained_parameters()))
    assert count.item() == len(rows)
    # sums over 6 positions x 97 tokens in float32, the KL itself a difference of sums of size 1 for each position
    tolerance = len(rows) * synthetic.VOCABULARY * torch.finfo(torch.float32).eps
    assert total.item() == pytest.approx(expected.item(), abs=tolerance)
    largest = max(gradient.abs().max() for gradient in expected_gradients)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=tolerance * largest.item())


class Valued(Phi3LoRAModule):
    """Has a value head beside the adapter, trained with the language loss."""

    def __init__(self, base: Any, **options: Any) -> None:
        super().__init__(base, **options)
        torch.manual_seed(9)
        self.value = nn.Linear(32, 1)

    def compute_loss(self, hidden, head, batch):
        total, count = super().compute_loss(hidden, head, batch)
        supervised = batch["labels"] != IGNORE_INDEX
        return total + (self.value(hidden).squeeze(-1)[supervised] - 1).square().sum(), count


def test_an_extra_head_is_trained_saved_and_restored(tmp_path, tiny_base):
    module, data = small(tiny_base, Valued), synthetic.loader([synthetic.batch_of([[row]]) for row in DOCUMENTS])
    start = module.value.weight.detach().clone()
    trainer = synthetic.trainer(tmp_path)
    trainer.fit(module, data)
    assert (module.value.weight - start).abs().max() > 1e-3
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    keys = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"].keys()
    assert len(keys) == 16 + 2

    loaded = Valued.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(loaded.value.weight, module.value.weight)
    resumed = small(tiny_base, Valued)
    synthetic.trainer(tmp_path, max_epochs=2).fit(resumed, data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    synthetic.trainer(tmp_path, max_epochs=2).fit(module, data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(resumed.value.weight, module.value.weight)
    assert not torch.equal(resumed.value.weight, loaded.value.weight)


def test_weight_decay_spares_the_bias_of_an_extra_head(tmp_path, tiny_base):
    module = small(tiny_base, Valued, optimizer={"lr": 1e-2, "weight_decay": 0.5})
    trainer = synthetic.trainer(tmp_path)
    trainer.fit(module, synthetic.loader([synthetic.batch_of([[DOCUMENTS[0]]])]))
    decays = {id(p): group["weight_decay"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert decays[id(module.value.bias)] == 0
    assert decays[id(module.value.weight)] == 0.5
    assert len(decays) == 16 + 2


def test_a_checkpoint_without_the_extra_head_is_refused(tmp_path, tiny_base):
    trainer = synthetic.trainer(tmp_path)
    trainer.fit(small(tiny_base), synthetic.loader([synthetic.batch_of([[DOCUMENTS[0]]])]))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match=r"missing value\.weight; missing value\.bias"):
        Valued.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)


# ---------------------------------------------------------------- one base, two adapters


def test_one_loaded_base_serves_two_adapters_one_after_the_other(tmp_path, tiny_base):
    base = Phi3ForCausalLM.from_pretrained(tiny_base)
    original = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    data = synthetic.loader([synthetic.batch_of([[row]]) for row in DOCUMENTS])

    def train(given, lora: dict) -> Phi3LoRAModule:
        torch.manual_seed(3)
        module = small(given, lora=lora, attn_implementation="sdpa")  # as the loaded base has it
        module.configure_model()
        synthetic.trainer(tmp_path).fit(module, data)
        return module

    first, second = {"r": 4, "lora_dropout": 0.0}, {"r": 2, "target_modules": ["qkv_proj"], "lora_dropout": 0.0}
    one = train(base, first)
    given_back = one.detach_adapter()
    assert given_back is base
    assert list(one.parameters()) == []
    assert base.state_dict().keys() == original.keys()
    assert not base.model.embed_tokens(torch.tensor([5])).requires_grad  # nothing of the training hangs on
    assert not any(getattr(layer, "gradient_checkpointing", False) for layer in base.modules())
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in original.items())
    two = train(base, second)
    alone = train(tiny_base, second)
    assert len(list(two.trained_parameters())) == 4
    assert all(map(torch.equal, two.trained_parameters(), alone.trained_parameters()))


def test_a_loaded_base_keeps_its_name_and_its_checkpoint_fits_the_folder(tmp_path, tiny_base):
    module = small(Phi3ForCausalLM.from_pretrained(tiny_base))
    trainer = synthetic.trainer(tmp_path)
    trainer.fit(module, synthetic.loader([synthetic.batch_of([[DOCUMENTS[0]]])]))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Phi3LoRAModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.base == tiny_base
    assert all(map(torch.equal, loaded.trained_parameters(), module.trained_parameters()))


def test_a_base_made_in_memory_is_given_again_to_load_its_checkpoint(tmp_path):
    def base() -> Phi3ForCausalLM:
        torch.manual_seed(4)
        return Phi3ForCausalLM(synthetic.tiny_config())

    module = small(base())
    trainer = synthetic.trainer(tmp_path)
    trainer.fit(module, synthetic.loader([synthetic.batch_of([[DOCUMENTS[0]]])]))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Phi3LoRAModule.load_from_checkpoint(tmp_path / "a.ckpt", base=base(), weights_only=True)
    assert all(map(torch.equal, loaded.trained_parameters(), module.trained_parameters()))
    other = Phi3ForCausalLM(synthetic.tiny_config())
    with pytest.raises(CheckpointError, match="another base model"):
        Phi3LoRAModule.load_from_checkpoint(tmp_path / "a.ckpt", base=other, weights_only=True)


# ---------------------------------------------------------------- a foreign script


SCRIPT = """
import sys
import torch
from phi3_lightning import Phi3LoRAModule

module = Phi3LoRAModule.load_from_checkpoint(sys.argv[1], map_location="cpu", weights_only=True).eval()
with torch.no_grad():
    logits = module.model(torch.tensor([[5, 6, 7, 8]]), use_cache=False).logits
torch.save(logits, sys.argv[2])
assert "phi3_lightning.cli" not in sys.modules
"""


@pytest.mark.slow
def test_a_foreign_script_loads_a_checkpoint_and_gets_the_same_logits(tmp_path, tiny_base):
    module = small(tiny_base)
    trainer = synthetic.trainer(tmp_path)
    trainer.fit(module, synthetic.loader([synthetic.batch_of([[row]]) for row in DOCUMENTS]))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "script.py").write_text("import torch; torch.set_num_threads(1)" + SCRIPT, encoding="utf-8")
    arguments = [sys.executable, "script.py", "a.ckpt", "logits.pt"]
    subprocess.run(arguments, check=True, capture_output=True, cwd=tmp_path, timeout=120)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    with torch.no_grad():
        expected = module.eval().model(torch.tensor([[5, 6, 7, 8]]), use_cache=False).logits
        with module.base_answers():
            base = module.model(torch.tensor([[5, 6, 7, 8]]), use_cache=False).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(found, base, atol=1e-3)


class OwnOptimizer(Valued):
    """Has its own optimiser: no schedule, and a separate learning rate for the head."""

    def configure_optimizers(self):
        adapter = [parameter for name, parameter in self.named_parameters() if ".lora_" in name]
        return torch.optim.SGD([{"params": adapter}, {"params": self.value.parameters(), "lr": 1e-3}], lr=1e-4)


def test_a_subclass_brings_its_own_optimiser(tmp_path, tiny_base):
    module, data = small(tiny_base, OwnOptimizer), synthetic.loader([synthetic.batch_of([[row]]) for row in DOCUMENTS])
    trainer = synthetic.trainer(tmp_path)
    trainer.fit(module, data)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [1e-4, 1e-3]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = synthetic.trainer(tmp_path, max_epochs=2)
    again.fit(module, data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert [group["lr"] for group in again.optimizers[0].param_groups] == [1e-4, 1e-3]
