"""Scores of answers are those of rouge_score and sacrebleu on the same texts, however they are batched."""

# ruff: noqa: RUF001  # texts in many scripts

import math
import re
import sys
from importlib.metadata import version

import pytest
import sacrebleu
import torch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from phi3_lightning.errors import ConfigError
from phi3_lightning.metrics import Answer, AnswerMetrics
from phi3_lightning.metrics.answers import scores
from phi3_lightning.metrics.segments import WordTokenizer, spaced

PAIRS = [
    ("The library opens at nine.", "The library opens at nine."),
    ("It opens at ten, I think.", "The library opens at nine."),
    ("First line.\nSecond line, longer.\nThird.", "Second line, longer.\nFirst line."),
    ("", "An answer was expected here."),
    ("“Greetings” from Cologne — it’s 9° …", "Greetings from Tokyo: it's 10°."),
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


EQUAL = {
    "Chinese": "今天天气很好，我们去公园。",
    "Japanese": "コーヒーを飲みます。",
    "Korean": "오늘은 날씨가 좋아서 공원에 갑니다",
    "Thai": "วันนี้อากาศดีมาก",
    "Lao": "ມື້ນີ້ອາກາດດີ",
    "Khmer": "ថ្ងៃនេះអាកាសធាតុល្អ",
    "Burmese": "ဒီနေ့ရာသီဥတုကောင်းတယ်",
    "Arabic": "الطقس جميل اليوم في المدينة",
    "Persian": "امروز هوا خیلی خوب است",
    "Hebrew": "מזג האוויר יפה היום מאוד",
    "Hindi": "आज मौसम बहुत अच्छा है",
    "Tamil": "இன்று வானிலை மிகவும் நன்றாக உள்ளது",
    "Russian": "Сегодня очень хорошая погода",
    "Greek": "Σήμερα ο καιρός είναι πολύ καλός",
    "Armenian": "Այսօր եղանակը շատ լավ է",
    "Amharic": "ዛሬ አየሩ በጣም ጥሩ ነው",
    "Tibetan": "དེ་རིང་གནམ་གཤིས་ཡག་པོ་འདུག",
    "Vietnamese": "Hôm nay thời tiết rất đẹp",
}


def scored(text: str, reference: str) -> dict[str, float]:
    return measured([Answer(text, reference, 1, True)], 1).compute()


@pytest.mark.parametrize("language", EQUAL)
def test_equal_answers_have_the_best_scores_in_every_script(language):
    found = scored(EQUAL[language], EQUAL[language])
    best = dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match"), 1.0) | {"chrf": 100.0}
    assert {name: found[name] for name in best} == best
    assert found["bleu"] == pytest.approx(100)


@pytest.mark.parametrize("language", EQUAL)
def test_a_shared_latin_word_does_not_make_answers_equal(language):
    others = EQUAL["Russian" if language != "Russian" else "Greek"]
    assert 0 < scored(f"{EQUAL[language]} WLAN", f"{others} WLAN")["rouge1"] < 0.5


def test_half_of_the_words_scores_one_half():
    assert scored("今天下雨", "今天晴朗")["rouge1"] == pytest.approx(0.5)  # by characters
    assert scored("хорошая книга", "хорошая погода")["rouge1"] == pytest.approx(0.5)  # by words
    assert scored("मौसम अच्छा", "मौसम खराब")["rouge1"] == pytest.approx(0.5)  # vowel signs do not split words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("東京タワーは333m。", ["東", "京", "タ", "ワ", "ー", "は", "333m"]),
        ("ก็ดี", ["ก็", "ดี"]),
        ("मैं हूँ", ["मैं", "हूँ"]),
        ("Cafe\u0301 CAFÉ", ["café", "café"]),
        ("ＡＢＣ１２３ ｶﾞ", ["abc123", "ガ"]),
        ("\u200fשלום\u200e", ["שלום"]),
        ("می\u200cخواهم", ["میخواهم"]),
        ("٣ كتب", ["٣", "كتب"]),
        ("don’t x² ½ ™ snake_case", ["don", "t", "x", "snake", "case"]),
    ],
)
def test_words_of_any_script(text, words):
    assert WordTokenizer().tokenize(text) == words


ENGLISH = "".join(map(chr, range(128))) + "’‘“”–—…°•€£™©½²\u00a0"


@given(st.text(ENGLISH), st.text(ENGLISH))
def test_english_is_scored_as_by_rouge_score_itself(text, reference):
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    ours = RougeScorer(kinds, tokenizer=WordTokenizer()).score(reference, text)
    assert ours == RougeScorer(kinds).score(reference, text)
    assert spaced(text) == text


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("今天天气很好，我们去公园。", "今天天气不错，我们去了公园吧。"),
        ("我用Python写了2个程序！", "我用Python写了两个程序。"),
        ("《红楼梦》是曹雪芹写的小说。", "《红楼梦》的作者是曹雪芹。"),
    ],
)
def test_bleu_of_chinese_is_that_of_sacrebleu_s_chinese_tokenizer(text, reference):
    expected = sacrebleu.corpus_bleu([text], [[reference]], tokenize="zh", force=True).score
    assert 0 < expected < 100
    assert scored(text, reference)["bleu"] == pytest.approx(expected)


def test_each_score_has_a_signature_of_its_tokenisation():
    found = {name: score.signature for name, score in scores().items() if score.signature}
    assert list(found) == ["rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf"]
    assert all(f"rouge_score {version('rouge_score')}, words of any" in found[name] for name in list(found)[:4])
    assert re.match(r"sacrebleu nrefs:1.*tok:13a.*one character a word in scripts without spaces$", found["bleu"])
    assert re.match(r"sacrebleu nrefs:1.*nc:6", found["chrf"])


def test_uneven_ranks_together_give_what_one_gives():
    parts, whole = [measured(ANSWERS[:3], 1), measured(ANSWERS[3:], 8)], measured(ANSWERS, 8)
    for name, metric in parts[0].by_name.items():
        metric.merge_state(parts[1].by_name[name])
    assert parts[0].compute() == whole.compute()


def test_no_answers_give_nan_and_not_a_score():
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
