"""Scores of answers are those of rouge_score and sacrebleu on the same texts, however they are split up."""

import math
import sys

import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer

from phi3_lightning.errors import ConfigError
from phi3_lightning.metrics import Answer, AnswerMetrics

PAIRS = [
    ("The library opens at nine.", "The library opens at nine."),
    ("It opens at ten, I think.", "The library opens at nine."),
    ("First line.\nSecond line, longer.\nThird.", "Second line, longer.\nFirst line."),
    ("", "An answer was expected here."),
    ("Grüße aus Köln 東京 !", "Grüße aus Tokio 東京 ."),
    ("yes", "no"),
    (" Yes. ", "Yes."),
    ("running quickly , he ran .", "he runs quick"),
]
ANSWERS = [Answer(text, reference, len(text.split()), bool(index % 3)) for index, (text, reference) in enumerate(PAIRS)]


def measured(answers, size: int) -> AnswerMetrics:
    metrics = AnswerMetrics()
    for start in range(0, len(answers), size):
        metrics.update(answers[start : start + size])
    return metrics


@pytest.fixture(scope="module")
def expected() -> dict[str, float]:
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    rouge = [RougeScorer(kinds).score(reference, text) for text, reference in PAIRS]
    found = {kind: sum(score[kind].fmeasure for score in rouge) / len(rouge) for kind in kinds}
    texts, references = [text for text, _ in PAIRS], [[reference for _, reference in PAIRS]]
    found["bleu"] = sacrebleu.corpus_bleu(texts, references).score
    found["chrf"] = sacrebleu.corpus_chrf(texts, references).score
    found["exact_match"] = 2 / 8
    found["stop_rate"] = 5 / 8
    found["answer_tokens"] = sum(len(text.split()) for text in texts) / 8
    return found


@pytest.mark.parametrize("size", [1, 3, 8])
def test_scores_are_those_of_the_libraries_in_batches_of_any_size(expected, size):
    # sums of float64, and the value as float32
    assert measured(ANSWERS, size).compute() == pytest.approx(expected, rel=2 * torch.finfo(torch.float32).eps)
    assert 0 < expected["rouge2"] < expected["rouge1"] < 1
    assert expected["rougeL"] != expected["rougeLsum"]
    assert 0 < expected["bleu"] < expected["chrf"] < 100


def test_a_mean_of_sentence_scores_would_be_another_number(expected):
    mean = sum(sacrebleu.sentence_chrf(text, [reference]).score for text, reference in PAIRS) / len(PAIRS)
    assert abs(mean - expected["chrf"]) > 1


def test_uneven_ranks_together_give_what_one_gives():
    parts, whole = [measured(ANSWERS[:3], 1), measured(ANSWERS[3:], 8)], measured(ANSWERS, 8)
    for name, metric in parts[0].by_name.items():
        metric.merge_state(parts[1].by_name[name])
    assert parts[0].compute() == whole.compute()


def test_no_answer_is_not_a_good_score():
    empty = AnswerMetrics()
    assert all(statistics.shape[0] == 0 for statistics in empty.update([]).values())
    assert all(math.isnan(value) for value in empty.compute().values())


def test_what_is_returned_adds_up_to_the_score(expected):
    metrics = AnswerMetrics()
    for name, statistics in metrics.update(ANSWERS).items():
        assert statistics.shape == (len(ANSWERS), metrics.by_name[name].score.width)
        value = metrics.by_name[name].score.value(statistics.sum(0).tolist())
        assert value == pytest.approx(expected[name], rel=2 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("library", ["rouge_score", "sacrebleu"])
def test_the_extra_is_named_where_it_is_missing(monkeypatch, library):
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"{library}.*phi3-lightning\[eval\].*evaluation\.rows: 0"):
        AnswerMetrics()
