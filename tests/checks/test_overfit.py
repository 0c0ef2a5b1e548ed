"""The overfit check blames rows, settings or base."""

import random
import string

import pytest

from phi3_lightning.checks import overfit
from phi3_lightning.checks.overfit_diagnosis import (
    GOOD_ROWS_GOOD_SETTINGS,
    GOOD_ROWS_MY_SETTINGS,
    MY_ROWS_GOOD_SETTINGS,
    MY_ROWS_MY_SETTINGS,
    ROUND_TRIP,
    OverfitDiagnosis,
)
from phi3_lightning.checks.rows import packaged_rows, read_sample


def results(made, rows):
    diagnosis = OverfitDiagnosis(
        made.shared_base, made.template, made.clip, made.folder, lambda name: None, lambda: None
    )
    plan = [[[index] for index in range(len(rows))]]
    good = packaged_rows(made.template)
    found = list(diagnosis.run(diagnosis.case(rows, plan), diagnosis.case(good, [[[i] for i in range(len(good))]])))
    return {result.name: result for result in found}


@pytest.mark.slow
def test_random_answers_are_blamed_on_the_data(suite, tmp_path):
    noise = random.Random(0)
    lines = [
        f'{{"prompt": "Question {number}?", "completion": "{"".join(noise.choices(string.ascii_letters, k=90))}"}}'
        for number in range(8)
    ]
    (tmp_path / "noise.jsonl").write_text("\n".join(lines))
    made = suite({"train": str(tmp_path / "noise.jsonl")}, dtype="bfloat16", precision="bf16-mixed")
    found = results(made, read_sample(made.options, made.template, made.context_length).rows)
    assert {name: result.outcome for name, result in found.items()} == {
        GOOD_ROWS_GOOD_SETTINGS: "ok", MY_ROWS_GOOD_SETTINGS: "FAIL", GOOD_ROWS_MY_SETTINGS: "ok",
        MY_ROWS_MY_SETTINGS: "skipped", ROUND_TRIP: "ok",
    }  # fmt: skip
    assert "preview" in found[MY_ROWS_GOOD_SETTINGS].remedy
    assert (
        "or a base too small for them (1.67 million parameters; these answers have"
        in found[MY_ROWS_GOOD_SETTINGS].remedy
    )


def test_learning_nothing_is_blamed_on_the_base(suite, monkeypatch):
    monkeypatch.setattr(overfit, "OVERFIT_STEPS", 1)
    made = suite()
    found = results(made, packaged_rows(made.template))
    assert found[GOOD_ROWS_GOOD_SETTINGS].outcome == "FAIL"
    assert "model.base" in found[GOOD_ROWS_GOOD_SETTINGS].remedy
    assert {result.outcome for name, result in found.items() if name != GOOD_ROWS_GOOD_SETTINGS} == {"skipped"}


def test_divergence_is_blamed_on_the_settings(suite, monkeypatch):
    made = suite(optimizer={"lr": 1e38})
    diagnosis = OverfitDiagnosis(made.shared_base, made.template, None, made.folder, lambda name: None, lambda: None)
    rows = packaged_rows(made.template)[:2]
    case = diagnosis.case(rows, [[[0, 1]]])
    with made.shared_base.module() as module:
        result, _ = overfit.overfit(module, case, made.shared_base.make_trainer, None, lambda: None)
    assert not result.falls
    assert not result.overfits
    assert "optimiser step" in str(result)


@pytest.mark.parametrize(("hidden_size", "first"), [(192, 1e-2), (576, 3e-3), (3072, 1e-3)])
def test_wide_models_get_lower_rates_first(hidden_size, first):
    assert overfit.known_rates(hidden_size)[0] == first
