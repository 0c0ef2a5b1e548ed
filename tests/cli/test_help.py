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
