"""The checks on preferences: rows, packing, and what counts as overfitted."""

import json
from itertools import islice

import pytest

from checks.test_suite import MY_ROWS, PACKED, failed, outcomes
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.checks import overfit
from phi3_lightning.checks.overfit import OverfitCase, OverfitResult
from phi3_lightning.checks.overfit_diagnosis import OverfitDiagnosis
from phi3_lightning.checks.rows import packaged_rows
from phi3_lightning.config import Objective, Optimizer
from phi3_lightning.config.objective import USED

QUESTIONS = [f"Is it {hour} o'clock?" for hour in range(1, 11)]
PAIRS = [{"prompt": question, "chosen": "Yes, it is.", "rejected": "No."} for question in QUESTIONS]
LABELLED = [
    {"prompt": question, "completion": "No." if number % 3 else "Yes, it is.", "label": number % 3 == 0}
    for number, question in enumerate(QUESTIONS)
]


def write(tmp_path, rows) -> dict:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": str(path), "val_fraction": 0.0}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpo", {"lora": {"init_lora_weights": False}, "gradient_checkpointing": "full"}),
        ("orpo", {"attn_implementation": "sdpa"}),
        ("kto", {"lora": {"use_dora": True}, "dtype": "bfloat16", "precision": "bf16-mixed"}),
    ],
)
def test_preferences_pass_every_check(suite, tmp_path, name, options):
    rows = LABELLED if name == "kto" else PAIRS
    found = outcomes(suite(write(tmp_path, rows), objective={"name": name}, **options))
    assert set(found.values()) == {"ok", "skipped"}
    assert [check for check, outcome in found.items() if outcome == "skipped"] == ["no held-out row is trained"]


def test_a_shared_prompt_that_is_too_long_fails(suite, monkeypatch, tmp_path):
    """The rejected answer begins with a token of the chosen one."""
    forward = Phi3LoRAModule.forward

    def leaking(self, batch):
        shared = batch.get("shared_lengths", [])
        return forward(self, {**batch, "shared_lengths": [[length and length + 2 for length in row] for row in shared]})

    made = suite(write(tmp_path, PAIRS), objective={"name": "dpo"})
    monkeypatch.setattr(Phi3LoRAModule, "forward", leaking)
    fault, _ = failed(made)
    assert fault.name == PACKED


def test_answers_of_one_label_are_named(suite, tmp_path):
    made = suite(write(tmp_path, [row | {"label": True} for row in LABELLED]), objective={"name": "kto"})
    [result] = islice(made.run(), 1)
    assert (result.name, result.outcome) == (MY_ROWS, "FAIL")
    assert "10 good answers and 0 bad ones" in result.figure
    assert "give rows of both labels" in result.remedy


@pytest.mark.parametrize("kind", ["pair", "labelled"])
def test_packaged_preferences_have_two_answers_and_two_labels(suite, kind):
    rows = packaged_rows(suite().template, kind)
    assert len(rows) == len(packaged_rows(suite().template))
    for row in rows:
        texts = [conversation.messages[-1]["content"] for conversation in row.conversations]
        assert len(set(texts)) == len(texts) == (2 if kind == "pair" else 1)
    if kind == "labelled":
        assert {row.document.preferred for row in rows} == {True, False}


def result(name: str, first: float, last: float, accuracy: float | None, **options) -> OverfitResult:
    case = OverfitCase([], [], [], 0)
    objective = Objective(name, **options)
    return OverfitResult(case, lambda: None, first, last, preference_accuracy=accuracy, objective=objective)


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "kto"])
def test_preferences_are_overfitted_at_half_the_loss_with_the_rewards_right(name):
    assert result(name, 0.7, 0.34, 1.0).overfits
    assert not result(name, 0.7, 0.36, 1.0).overfits
    assert result(name, 0.7, 0.34, 0.875).overfits == (name == "kto")
    assert not result(name, 0.7, 0.34, 0.625).overfits
    assert result(name, 0.7, 0.66, 0.5).falls
    assert not result(name, 0.6931, 0.6923, 1.0).falls  # which is log 2, but for rounding


def test_orpo_is_overfitted_where_chats_are():
    assert result("orpo", 7.0, 0.75, 1.0).overfits
    assert not result("orpo", 7.0, 0.77, 1.0).overfits
    assert result("orpo", 7.0, 1.03, 1.0, beta=0.5).overfits


@pytest.mark.parametrize(
    ("lr", "tried"), [(5e-6, 2.5e-4), (1e-3, 1e-2), (1e-2, 1e-2), (0.5, 0.5), (1e-9, pytest.approx(5e-8))]
)
def test_the_rate_of_a_preference_run_is_raised_for_a_few_steps(suite, lr, tried):
    def changes(name: str):
        made = suite(objective={"name": name}, optimizer={"lr": lr})
        diagnosis = OverfitDiagnosis(made.shared_base, made.template, 1.0, made.folder, print, lambda: None)
        return diagnosis._user_rate(1e-2)

    changed, note = changes("dpo")
    assert changed.get("optimizer", Optimizer(lr=lr)).lr == pytest.approx(tried)
    assert (f"too few for {lr:g}" in note) == (tried != lr)
    assert changes("supervised") == ({}, "")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "dpo" else pytest.mark.slow) for name in USED if name != "supervised"],
)
def test_good_preferences_are_overfitted(suite, name, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # another test's: KTO at this rate is stuck from some seeds
    made = suite(objective={"name": name, "beta": 2.0 if name == "simpo" else 0.1})
    diagnosis = OverfitDiagnosis(made.shared_base, made.template, 1.0, made.folder, print, lambda: None)
    rows = packaged_rows(made.template, "labelled" if name == "kto" else "pair")
    case = diagnosis.case(rows, [[[index] for index in range(len(rows))]])
    with made.shared_base.module(optimizer={"lr": 1e-2}, lora={"r": 16, "lora_dropout": 0.0}) as module:
        found, _ = overfit.overfit(module, case, made.shared_base.make_trainer, 1.0, lambda: None)
    assert found.overfits, str(found)
    assert found.preference_accuracy >= (0.75 if name == "kto" else 1)
    assert str(found).endswith(" of 8 rows rewarded right")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_all_checks_of_preferences_pass(suite, tmp_path, name):
    rows = LABELLED if name == "kto" else PAIRS
    made = suite(write(tmp_path, rows), objective={"name": name}, optimizer={"lr": 2e-4})
    assert {each.outcome for each in made.run()} == {"ok", "skipped"}
