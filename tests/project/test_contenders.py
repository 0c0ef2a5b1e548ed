"""What makes the benchmark fair: equal work, counts, order, and the arithmetic of the table. No peer is needed."""

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, Phi3ForCausalLM

import preferences
import synthetic
from contenders import chats, clock, heldout
from contenders.catalogue import CONTENDERS, OURS, Contender
from contenders.ceiling import needed_flops
from contenders.clock import Clock, Step
from contenders.report import COLUMNS, Measured, alternating, cells, markdown
from contenders.servers import Servers
from contenders.task import IGNORE_INDEX, TARGETS, Row, Task, read_rows, write_rows
from phi3_lightning import ChatDataModule

TINY = Path(__file__).parents[2] / "src/phi3_lightning/assets/tiny_phi3"


@pytest.fixture
def task(tmp_path) -> Task:
    return Task(
        base=str(TINY), rows=str(tmp_path / "rows.jsonl"), pad=0, row_tokens=128, micro_batch=2, accumulate=2, steps=3,
        warmup=1, device="cpu", out=str(tmp_path),
    )  # fmt: skip


# ---------------------------------------------------------------------- counting and timing


class Model(nn.Module):
    """Has the signature of a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, input_ids, labels, attention_mask=None):
        return self.weight * input_ids.sum()


IDS = torch.tensor([[5, 6, 7, 8], [9, 5, 0, 0]])
LABELS = torch.tensor([[5, -100, 7, 8], [-100, 5, -100, -100]])  # the first label is predicted by nothing


def train(task: Task, monkeypatch, micro_batches: int) -> Clock:
    """Three optimiser steps of some micro-batches, a second each for the first, two for the second, and so on."""
    ticks = iter([100.0, 102.0, 105.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(ticks))
    measured, model = Clock(task), Model()
    optimizer = torch.optim.AdamW(model.parameters())
    measured.watch(model)
    for _ in range(3):
        for _ in range(micro_batches):
            model(input_ids=IDS, labels=LABELS).backward()
        optimizer.step()
    return measured


def test_a_step_counts_real_tokens_and_lasts_from_the_previous_one(task, monkeypatch):
    measured = train(task, monkeypatch, micro_batches=2)
    assert measured.steps == [Step(seconds, 16, 12, 6) for seconds in (None, 2.0, 3.0)]
    assert measured.timed() == measured.steps[1:]
    assert measured.peak_bytes > 1e8  # torch alone is more


def test_negative_control_a_pad_id_in_rows_is_counted_as_padding(task, monkeypatch):
    measured = train(dataclasses.replace(task, pad=5), monkeypatch, micro_batches=1)
    assert measured.steps[0].real == 6  # not 8, as two real tokens equal the pad id: rows must not contain it


def test_steps_after_the_last_are_not_counted(task, monkeypatch):
    measured = train(dataclasses.replace(task, steps=2), monkeypatch, micro_batches=1)
    assert len(measured.steps) == 2


def test_each_contender_runs_once_before_any_comes_again():
    assert list(alternating(["a", "b", "c"], 2)) == [(0, "a"), (0, "b"), (0, "c"), (1, "a"), (1, "b"), (1, "c")]


def test_names_of_contenders_are_different_and_ours_are_among_them():
    names = [contender.name for contender in CONTENDERS]
    assert len(set(names)) == len(names)
    assert set(OURS) <= set(names)


# ---------------------------------------------------------------------- rows


def test_generated_chats_have_the_lengths_that_are_promised_and_train_the_assistant_alone(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    chats.write_chats(tmp_path / "chats.jsonl", 300, tokenizer)
    rows = chats.encode(str(tmp_path / "chats.jsonl"), str(TINY), 512, tmp_path / "cache")
    lengths = torch.tensor([len(row.input_ids) for row in rows], dtype=torch.float64)
    # the median of 300 log-normal draws is within three standard errors (1.25 sigma / sqrt(n)) of its own, words aside
    assert lengths.median().log().item() == pytest.approx(
        torch.tensor(chats.MEDIAN).log().item(), abs=3 * 1.25 * chats.SPREAD / 300**0.5
    )
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for row in rows[:20]:
        assert tokenizer.pad_token_id not in row.input_ids
        trained = [label != IGNORE_INDEX for label in row.labels]
        assert all(label in (IGNORE_INDEX, token) for token, label in zip(*row, strict=True))
        turns = row.input_ids.count(end)
        assert sum(a and not b for a, b in zip(trained, [*trained[1:], False], strict=True)) == turns // 2
        assert row.labels[-1] != IGNORE_INDEX  # chats end with the assistant


def test_the_rows_of_a_step_fill_a_packed_row_and_none_is_held_out():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 200, (400,), generator=generator).tolist()
    rows = [Row([index] * length, [index] * length) for index, length in enumerate(lengths)]
    chosen, others = chats.choose(rows, steps=5, per_step=8, row_tokens=1024, held_out=30)
    names = [row.input_ids[0] for row in chosen + others]
    assert (len(chosen), len(others), len(set(names))) == (40, 30, 70)
    for start in range(0, 40, 8):
        assert 0.85 * 1024 <= sum(len(row.input_ids) for row in chosen[start : start + 8]) <= 0.95 * 1024


def test_too_few_rows_and_rows_that_do_not_fit_are_refused():
    rows = [Row([1] * 100, [1] * 100)] * 20
    with pytest.raises(ValueError, match="20 rows are too few for 3 steps of 8 and 4 others"):
        chats.choose(rows, steps=3, per_step=8, row_tokens=900, held_out=4)
    with pytest.raises(ValueError, match="no 8 rows fill 85% to 95% of 2000 tokens"):
        chats.choose(rows, steps=1, per_step=8, row_tokens=2000, held_out=4)


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [Row([1, 2, 3], [IGNORE_INDEX, 2, 3]), Row([4], [4])]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize("name", preferences.SETS)
def test_a_packed_row_holds_the_pairs_of_a_step(tmp_path, shared, name):
    lengths = preferences.SETS[name]
    folder = str(shared / "phi3-mini-4k-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    preferences.write_pairs(tmp_path / "pairs.jsonl", 5 * preferences.PAIRS, lengths, tokenizer)
    ours, *_ = preferences.contenders(lengths.row_tokens, tmp_path)
    data = ChatDataModule(
        train=str(tmp_path / "pairs.jsonl"), tokenizer=folder, batch_size=1, val_fraction=0.0, num_workers=0,
        cache_dir=str(tmp_path), **ours.options["data"],
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(batch["shared_lengths"][0]) for batch in batches] == [2 * preferences.PAIRS] * 5
    near = pytest.approx(lengths.prompt, rel=2 * preferences.VARIATION)
    assert all(shared == near for batch in batches for shared in batch["shared_lengths"][0][1::2])


# ---------------------------------------------------------------------- the table


@pytest.mark.parametrize("tied", [False, True])
def test_needed_operations_are_those_that_torch_counts_in_the_frozen_products(tmp_path, tied):
    folder = synthetic.save_tiny(tmp_path, tie_word_embeddings=tied)
    model = Phi3ForCausalLM.from_pretrained(folder).requires_grad_(False)
    inputs = torch.randn(1, 24, model.config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        model.lm_head(hidden[0, :10]).sum().backward()
    products = counter.get_flop_counts()["Global"]
    assert needed_flops(folder, real=24, supervised=10) == products[torch.ops.aten.mm]


def test_a_row_of_the_table_has_medians_spread_and_shares(tiny_base):
    steps = [Step(2.0, 1000, 800, 400), Step(1.0, 1000, 800, 400), Step(4.0, 1000, 800, 400)]
    found = Measured("assistant", steps, [3_000_000_000, 1_000_000_000, 2_000_000_000], loss=1.23456)
    peak = 8 * needed_flops(tiny_base, 800, 400)  # the median step takes two seconds: a sixteenth
    assert cells("us", found, tiny_base, peak) == [
        "us", "400", "200 to 800", "200", "2.00", "6.2%", "20%", "assistant", "1.2346",
    ]  # fmt: skip


def test_a_contender_that_did_not_run_says_why(tiny_base):
    row = cells("them", Measured(error="ImportError: no | module"), tiny_base, 1.0)
    assert len(row) == len(COLUMNS)
    assert markdown([row], COLUMNS).splitlines()[2].startswith(r"| them | did not run: ImportError: no \| module |  |")


def test_a_markdown_table_has_a_cell_for_each_column():
    assert markdown([["a", "1"]], ["name", "n"]) == "| name | n |\n| --- | ---: |\n| a | 1 |\n"


# ---------------------------------------------------------------------- the loss afterwards


def test_the_loss_of_an_adapter_is_that_which_transformers_computes(tiny_base, tmp_path):
    torch.manual_seed(0)
    model = Phi3ForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    base = Phi3ForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(target_modules=list(TARGETS), init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    rows = [
        Row(*synthetic.document(12, 5, seed)) for seed in range(3)
    ]  # as many targets each: a mean of means is right
    fresh = get_peft_model(Phi3ForCausalLM.from_pretrained(tiny_base), LoraConfig(target_modules=list(TARGETS)))
    fresh.save_pretrained(tmp_path / "fresh")
    adapters = {name: str(tmp_path / name) for name in ("adapter", "fresh")}
    found = heldout.losses(tiny_base, rows, adapters, "cpu")
    for name, judge in (("adapter", adapted), ("", base.eval())):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            expected = [judge(input_ids=torch.tensor([i]), labels=torch.tensor([t])).loss.item() for i, t in rows]
        assert found[name] == pytest.approx(sum(expected) / 3, rel=1e-6)
    assert abs(found["adapter"] - found[""]) > 1e-3
    assert found["fresh"] == found[""]  # a fresh adapter changes nothing, and the previous one has left nothing behind


# ---------------------------------------------------------------------- a run


@pytest.mark.slow
def test_contenders_do_equal_work_in_processes_of_their_own(task, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    chats.write_chats(tmp_path / "chats.jsonl", 200, tokenizer)
    rows = chats.encode(str(tmp_path / "chats.jsonl"), str(TINY), 256, tmp_path / "cache")
    chosen, others = chats.choose(rows, steps=3, per_step=4, row_tokens=512, held_out=20)
    write_rows(Path(task.rows), chosen)
    task = dataclasses.replace(task, pad=tokenizer.pad_token_id, row_tokens=512, dropout=0.0)
    servers = Servers(tmp_path / "peers", cuda=False, logs=tmp_path)
    settings = [
        Contender("ours", "ours", None, {"model": {"gradient_checkpointing": "none"}}),
        Contender("plain", "plain", None, {"checkpointing": False}),
        Contender("broken", "plain", None, {}),
    ]
    found, adapters = {}, {}
    for contender in settings:
        out = tmp_path / contender.name
        out.mkdir()
        found[contender.name] = servers.order(contender, dataclasses.replace(task, out=str(out)))
        adapters[contender.name] = str(out)
    servers.close()
    assert found.pop("broken") == {"error": "KeyError: 'checkpointing'"}
    per_step = [chosen[start : start + 4] for start in (4, 8)]  # the loop takes rows in their order
    expected = [sum(len(row.input_ids) for row in rows) for rows in per_step]
    assert [step["real"] for step in found["plain"]["steps"]] == expected
    assert all(435 <= step["real"] <= 512 for step in found["ours"]["steps"])
    del adapters["broken"]
    losses = heldout.losses(task.base, others, adapters, "cpu")
    learned = losses[""] - losses["plain"]
    assert learned > 0.05
    # the same rows in as many steps, in another order and with another start
    assert losses["ours"] == pytest.approx(losses["plain"], abs=0.2 * learned)
