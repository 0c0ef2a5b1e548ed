"""Preference objectives on the command line: what cannot work is refused by each command before a base is loaded."""

import json
import re

import pytest

from cli.conftest import QUICK, REPOSITORY
from phi3_lightning.commands.parser import prepare
from phi3_lightning.commands.plan import Plan, parser
from phi3_lightning.errors import ConfigError

PAIRS = [{"prompt": f"Is it {hour} o'clock?", "chosen": "Yes, it is.", "rejected": "No."} for hour in range(1, 9)]


def rows(tmp_path, name: str, lines: list[dict]) -> str:
    path = tmp_path / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("command", ["plan", "check", "fit"])
def test_rows_of_another_kind_are_refused_before_anything_is_tokenised_or_loaded(cli, tmp_path, command):
    cache = f"--data.cache_dir={tmp_path}/cache"
    text = cli(command, *QUICK, cache, "--model.objective.name=dpo", code=1).text
    assert "model.objective.name: 'dpo' cannot be used: it learns from pairs, and the rows of data.train are" in text
    assert "chats_train.jsonl:1); give it such rows, or set supervised" in text
    pairs = rows(tmp_path, "pairs.jsonl", PAIRS)
    text = cli(command, *QUICK, cache, f"--data.val={pairs}", code=1).text
    assert f"data.val: {pairs}:1 is a pair of chosen and rejected, and" in text
    text = cli(command, *QUICK, cache, f"--data.train={pairs}", "--data.val=null", "--model.objective.name=kto", code=1)
    assert "write a pair as two rows: prompt, completion, and label true or false" in text.text
    assert not (tmp_path / "cache").exists()


def test_metrics_that_the_objective_does_not_measure_are_not_watched(cli, tmp_path):
    text = cli("fit", *QUICK, "--checkpoint.monitor=val/ranking_accuracy", code=1).text
    assert "checkpoint.monitor: 'val/ranking_accuracy' cannot be used: model.objective.name supervised measures" in text
    stop = (
        "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/perplexity",
    )  # fmt: skip
    pairs = (f"--data.train={rows(tmp_path, 'pairs.jsonl', PAIRS)}", "--data.val=null", "--model.objective.name=dpo")
    text = cli("fit", *QUICK, *pairs, *stop, code=1).text
    assert "EarlyStopping.monitor: 'val/perplexity' cannot be used" in text
    assert "val/preference_accuracy" in text


def planned(*options: str) -> Plan:
    config = parser().parse_args([*QUICK, "--data.val=null", *options])
    prepare(config)
    return Plan(config, lambda _: None)


def test_a_plan_says_what_pairs_share_and_what_kto_depends_on(tmp_path):
    cache, pairs = f"--data.cache_dir={tmp_path}/cache", rows(tmp_path, "pairs.jsonl", PAIRS)
    plan = planned(cache, f"--data.train={pairs}", "--model.objective.name=dpo")
    words = r"259 tokens, \d+ of them computed once for two answers, 7 pairs, 1 rows \(the largest of 1 in data.train\)"
    assert re.match(words, plan._describe_batch())
    labelled = [{"prompt": pair["prompt"], "completion": "Yes.", "label": n % 2 == 0} for n, pair in enumerate(PAIRS)]
    kto = (f"--data.train={rows(tmp_path, 'labelled.jsonl', labelled)}", "--model.objective.name=kto")
    plan = planned(cache, *kto, "--data.max_length=32")
    assert "kto: its baseline is a mean over the answers of a micro-batch" in plan._describe_baseline()
    assert "; 7 micro-batches hold one answer, which is then its own baseline" in plan._describe_baseline()
    assert "which is then" not in planned(cache, *kto)._describe_baseline()
    plan = planned("--data.train=null", "--model.objective.name=simpo")
    assert plan._describe_batch().startswith("512 tokens, 0 of them computed once for two answers, 1 pairs, 1 rows")


def test_a_plan_refuses_a_copied_reference_under_fsdp2():
    sharded = f"--config={REPOSITORY}/configs/overlays/fsdp2.yaml"
    options = (sharded, "--data.train=null", "--trainer.accelerator=cpu", "--model.objective.name=dpo")
    assert planned(*options).spec.sharded
    with pytest.raises(ConfigError, match=r"model.objective.name: 'dpo' cannot be used: its reference is a copy"):
        planned(*options, "--model.lora.init_lora_weights=false")
