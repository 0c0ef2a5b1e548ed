"""What --help says, and that every shipped configuration parses."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from cli.conftest import REPOSITORY
from phi3_lightning.config.data import DataConfig

CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))


def test_help_lists_the_commands(cli):
    text = cli("--help").text
    assert all(command in text for command in ("fit", "validate", "test", "predict"))


def test_help_of_fit_shows_the_docstrings_of_fields(cli):
    text = " ".join(cli("fit", "--help").text.split())
    assert "Rank of the update" in text
    assert "Highest learning rate of the schedule" in text
    assert "Folder or hub id of the base model" in text
    assert "Name of the run: its folder is runs/NAME" in text
    assert "Maximum number of tokens in a row" in text
    assert all(f"--data.{field.name} " in text for field in fields(DataConfig))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_each_configuration_parses_to_the_values_it_states(cli, config: Path):
    printed = yaml.safe_load(cli("fit", f"--config={config}", "--print_config").text)
    written = yaml.safe_load(config.read_text())

    def inside(part, whole, path=""):
        for key, value in part.items():
            if isinstance(value, dict):
                inside(value, whole[key], f"{path}{key}.")
            elif key != "callbacks":
                assert whole[key] == value, f"{path}{key}"

    inside(written, printed)


@pytest.mark.parametrize("words", [(), ("--help",)])
def test_help_has_one_line_for_each_command(cli, words):
    lines = cli(*words).text.splitlines()
    for command in ("fit", "validate", "test", "predict", "init", "preview", "check", "plan", "chat", "export"):
        [line] = [line for line in lines if line.split()[:1] == [command]]
        assert line.endswith(".")
    assert max(map(len, lines)) <= 120


def test_a_misspelt_command_is_corrected(cli):
    assert cli("ft", code=2).text.splitlines()[-1] == "error: there is no command 'ft'; did you mean fit?"


@pytest.mark.parametrize("command", ["fit", "preview", "check"])
def test_a_misspelt_key_of_a_file_has_file_line_and_suggestion(cli, tmp_path, command):
    (tmp_path / "good.yaml").write_text("data:\n  train: chats.jsonl\n")
    (tmp_path / "bad.yaml").write_text("# mine\ndata:\n  max_lenth: 8\n")
    refused = cli(command, "--config=good.yaml", "--config=bad.yaml", code=2).text.splitlines()
    assert refused[-2:] == ["error: bad.yaml:3: key 'data.max_lenth' is not an option", "did you mean data.max_length?"]
    assert len(refused) < 6  # not pages of usage


@pytest.mark.parametrize("command", ["fit", "preview", "check"])
def test_a_value_of_another_type_has_the_line_of_the_file_that_gave_it(cli, tmp_path, command):
    (tmp_path / "good.yaml").write_text("data: {batch_size: 2}\n")
    (tmp_path / "bad.yaml").write_text("# mine\ndata:\n  batch_size: many\n")
    [line] = cli(command, "--config=good.yaml", "--config=bad.yaml", code=2).text.splitlines()[-1:]
    assert line == "error: bad.yaml:3: data.batch_size: many cannot be used: Expected a int"
    [line] = cli(command, "--config=good.yaml", "--data.batch_size=many", code=2).text.splitlines()[-1:]
    assert line == "error: --data.batch_size: many cannot be used: Expected a int"  # which no file has


def test_a_misspelt_section_of_a_file_is_found_too(cli, tmp_path):
    (tmp_path / "bad.yaml").write_text("model: {base: x, optimizr: {lr: 1}}\n")
    refused = cli("fit", "--config=bad.yaml", code=2).text.splitlines()
    assert refused[-2:] == [
        "error: bad.yaml:1: key 'model.optimizr.lr' is not an option", "did you mean model.optimizer.lr?"
    ]  # fmt: skip
