"""A row whose loss is not finite is named, and the last good checkpoint is kept."""

import json
import math

import pytest
import torch

import synthetic
from callbacks.test_samples import TINY
from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.callbacks import BadRows, RunCheckpoint
from phi3_lightning.callbacks.bad_rows import find_bad_documents
from phi3_lightning.checkpoint.io import SafeCheckpointIO
from phi3_lightning.errors import DivergenceError

POISON = 96
"""A token whose embedding is NaN; synthetic documents may contain it too."""


class Poisoned(Phi3LoRAModule):
    """Gives NaN wherever a document contains the token."""

    token = POISON

    def forward(self, batch):
        hidden = super().forward(batch)
        bad = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
        for row, lengths in enumerate(batch["document_lengths"]):
            start = 0
            for length in lengths:
                own = slice(start, start + length)
                bad[row, own] = bool((batch["input_ids"][row, own] == self.token).any())
                start += length
        return hidden.masked_fill(bad[..., None], math.nan)


def documents(count: int, bad: set[int]):
    """Rows of two documents, one micro-batch a row."""
    rows = []
    for number in range(count):
        ids, labels = synthetic.document(10, 5, number)
        ids = [token - (token == POISON) for token in ids]
        labels = [token - (token == POISON) for token in labels]
        if number in bad:
            ids[2] = POISON
        rows.append((ids, labels))
    return [synthetic.batch_of([rows[i : i + 2]], first_id=i) for i in range(0, count, 2)]


def poisoned_module(base) -> Poisoned:
    return Poisoned(base, dtype="float32", lora={"r": 4, "lora_dropout": 0.0}, optimizer={"lr": 1e-2})


def test_only_the_bad_row_of_an_accumulation_window_is_named(tmp_path, tiny_base):
    checkpoint = RunCheckpoint(str(tmp_path / "kept"), every_n_steps=1)
    trainer = synthetic.trainer(
        tmp_path, callbacks=[BadRows(), checkpoint], accumulate_grad_batches=2, plugins=[SafeCheckpointIO()],
        enable_checkpointing=True,
    )  # fmt: skip
    with pytest.raises(DivergenceError, match="optimiser step 3") as caught:
        trainer.fit(poisoned_module(tiny_base), synthetic.loader(documents(14, {11})))
    assert caught.value.document_ids == [11]
    kept = torch.load(tmp_path / "kept/last.ckpt", weights_only=True)
    assert kept["global_step"] == 2
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values())


def test_without_the_callback_every_row_of_the_window_is_named(tmp_path, tiny_base):
    trainer = synthetic.trainer(tmp_path, accumulate_grad_batches=2)
    with pytest.raises(DivergenceError) as caught:
        trainer.fit(poisoned_module(tiny_base), synthetic.loader(documents(14, {11})))
    assert caught.value.document_ids == [8, 9, 10, 11]


def test_all_rows_are_named_where_only_the_gradient_is_not_finite(tmp_path, tiny_base):
    class Steep(Phi3LoRAModule):
        def compute_loss(self, hidden, head, batch):
            loss, count = super().compute_loss(hidden, head, batch)
            return loss + (loss - loss.detach()).sqrt(), count  # a finite loss with an infinite gradient

    module = Steep(tiny_base, dtype="float32")
    with pytest.raises(DivergenceError) as caught:
        synthetic.trainer(tmp_path, callbacks=[BadRows()]).fit(module, synthetic.loader(documents(4, set())))
    assert caught.value.document_ids == [0, 1]


def chat_file(path, marked: int):
    rows = [f"Answer {number}" for number in range(4)]
    rows[marked] = "Answer zzz"
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": "Say"}, {"role": "assistant", "content": row}]}) + "\n"
            for row in rows
        )
    )
    return str(path)


def test_validation_warns_of_its_bad_row_and_continues(tmp_path):
    data = ChatDataModule(
        train=str(TINY / "chats_val.jsonl"), val=chat_file(tmp_path / "held_out.jsonl", 2), tokenizer=str(TINY),
        max_length=128, packing=True, num_workers=0, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    (marked,) = [d for d in data.prepared["val"].documents([0, 1, 2, 3]) if "zzz" in data.tokenizer.decode(d.input_ids)]
    others = {i for d in data.prepared["val"].documents([0, 1, 3]) for i in d.input_ids.tolist()}
    every = list(range(len(data.prepared["train"].lengths())))
    trained = {i for d in data.prepared["train"].documents(every) for i in d.input_ids.tolist()}
    module = Poisoned(str(TINY), dtype="float32", generation={"max_new_tokens": 4})
    module.token = next(i for i in marked.input_ids.tolist() if i not in others | trained)
    checkpoint = RunCheckpoint(str(tmp_path / "kept"))
    trainer = synthetic.trainer(
        tmp_path, callbacks=[BadRows(), checkpoint], plugins=[SafeCheckpointIO()], max_steps=2, max_epochs=-1,
        val_check_interval=1, enable_checkpointing=True, num_sanity_val_steps=0,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"validation loss is not finite\. Rows: .*held_out\.jsonl:3\. ") as caught:
        trainer.fit(module, data)
    assert len([w for w in caught if "not finite" in str(w.message)]) == 2  # once per validation
    assert not checkpoint.best_path.exists()
    assert checkpoint.last_path.exists()


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_preferences_whose_loss_is_not_finite_are_found(tmp_path, tiny_base, name):
    pairs = [synthetic.pair(9, 4, 5, seed) for seed in range(4)]
    if name == "dpo":
        batch = synthetic.pairs_of([pairs[:2], pairs[2:]])
    else:
        batch = synthetic.labelled_of([[pair[0] for pair in pairs]], [[True, False, True, False]])
    first = batch["document_lengths"][0]
    batch["input_ids"][0, first[0] + first[1] if name == "dpo" else first[0]] = 2
    module = Poisoned(tiny_base, dtype="float32", objective={"name": name})
    module.token = 2  # which is in no other document
    module.configure_model()
    assert find_bad_documents(synthetic.trainer(tmp_path), module.eval(), batch) == [1]
