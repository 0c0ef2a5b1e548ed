"""The tables of docs/migration.md name keys that exist."""

import dataclasses
import re

import transformers
import yaml

from cli.conftest import REPOSITORY
from phi3_lightning.commands.translation.keys import TABLE

TEXT = (REPOSITORY / "docs/migration.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)$(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))


def rows(section: str) -> list[tuple[str, str]]:
    return re.findall(r"^\| (.+?) \| (.+?) \|$", SECTIONS[section], re.MULTILINE)[1:]


def keys(cell: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", cell)


def flat(values: dict, prefix: str = "") -> set[str]:
    found = set()
    for key, value in values.items():
        found |= {prefix + key} | (flat(value, f"{prefix}{key}.") if isinstance(value, dict) else set())
    return found


def test_every_key_on_our_side_is_an_option(cli):
    options = flat(yaml.safe_load(cli("fit", "--config=configs/quickstart.yaml", "--print_config").text))
    for section in ("TRL and PEFT", "Axolotl", "LLaMA-Factory", "LitGPT", "torchtune"):
        table = rows(section)
        assert len(table) > 15
        for _, ours in table:
            assert set(keys(ours)) <= options, ours
    assert {option for option, _ in TABLE.values()} <= options


def test_every_key_of_trl_is_translated_as_the_table_says():
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    for theirs, ours in rows("TRL and PEFT"):
        for key in keys(theirs):
            assert key in fields or key in TABLE or key == "save_pretrained"
            path, _ = TABLE.get(key, ("", None))
            assert not path or any(name in path for name in keys(ours)), (
                f"{key} becomes {path}, and the table says {ours}"
            )
