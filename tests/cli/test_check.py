"""``check`` from the command line: a table, an exit code, and nothing left behind."""

import json
import re
import shutil
from pathlib import Path

import pytest

from cli.conftest import REPOSITORY, TINY

CONFIG = (
    f"--config={REPOSITORY}/configs/quickstart.yaml", f"--model.base={TINY}",
    f"--data.train={TINY}/chats_train.jsonl", f"--data.val={TINY}/chats_val.jsonl", "--data.predict=null",
)  # fmt: skip
CHECKS = 12


def lines(text: str) -> dict[str, list[str]]:
    """The names of the checks, by outcome."""
    found = re.findall(r"^(ok|FAIL|skipped) +([^:]+): ", text, re.MULTILINE)
    return {outcome: [name for other, name in found if other == outcome] for outcome in ("ok", "FAIL", "skipped")}


def test_a_sound_setup_passes_and_nothing_is_written(cli, tmp_path, monkeypatch):
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)
    checked = cli("check", *CONFIG, f"--data.cache_dir={cache}", "--run=mine")
    found = lines(checked.text)
    assert (len(found["ok"]), found["FAIL"], found["skipped"]) == (CHECKS, [], [])
    assert "checking: packed = unpacked" in checked.text  # progress lines without a terminal
    assert "All is sound" in checked.text
    assert "Warning" not in checked.text
    assert "\x1b" not in checked.text
    assert [path.name for path in tmp_path.iterdir() if path != checked.output] == ["temporary"]
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_a_learning_rate_that_is_too_low_is_named(cli):
    checked = cli("check", *CONFIG, "--model.optimizer.lr=1e-9", code=1)
    found = lines(checked.text)
    assert found["FAIL"] == ["good rows, my settings"]
    assert found["skipped"] == ["my rows, my settings"]
    assert "what to do: it is your settings: model.optimizer.lr" in checked.text
    assert "The fault lies with your settings" in checked.text


@pytest.mark.slow
def test_another_adapter_passes(cli):
    assert len(lines(cli("check", *CONFIG, "--model.lora.use_dora=true").text)["ok"]) == CHECKS


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_bases_pass(cli, kind):
    pytest.importorskip("bitsandbytes")
    assert lines(cli("check", *CONFIG, f"--model.quantization={kind}").text)["FAIL"] == []


@pytest.mark.slow
def test_an_untrained_base_is_blamed(cli):
    checked = cli("check", *CONFIG, "--model.init=random", code=1)
    assert lines(checked.text)["FAIL"] == ["good rows, good settings"]
    assert "the base or this machine" in checked.text


def test_usage_errors_are_named_and_the_help_lists_options(cli, tmp_path):
    assert "model.optimizer.lr" in cli("check", *CONFIG, "--model.optimizer.ir=1", code=2).text
    assert "nowhere.jsonl" in cli("check", *CONFIG, "--data.train=nowhere.jsonl", code=1).text
    assert (
        "query_proj matches no layer" in cli("check", *CONFIG, "--model.lora.target_modules=[query_proj]", code=1).text
    )
    shown = cli("check", "--help").text
    assert "Prove on your own model" in shown
    assert "--model.lora.r" in shown


def test_a_broken_folder_is_named(cli, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "llama", "architectures": ["X"]}))
    assert "Phi3ForCausalLM models work" in cli("check", *CONFIG, f"--model.base={Path(base)}", code=1).text
