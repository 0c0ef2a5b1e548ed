"""The shapes built into ``plan`` are those of the files that the family's configurations name."""

import json

import pytest
import yaml
from transformers import Phi3Config

from cli.conftest import REPOSITORY
from phi3_lightning.planning.published_configs import PUBLISHED, write_config
from recipes import published

CONFIGS = {name: yaml.safe_load((REPOSITORY / f"configs/{name}.yaml").read_text()) for name in published.PUBLISHED}
SHAPES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "tie_word_embeddings", "sliding_window", "max_position_embeddings",
)  # fmt: skip


def test_the_whole_family_is_there():
    assert {config["model"]["base"] for config in CONFIGS.values()} == PUBLISHED.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_those_of_the_configuration(tmp_path, name):
    write_config(CONFIGS[name]["model"]["base"], tmp_path)
    ours, theirs = Phi3Config.from_pretrained(tmp_path), published.PUBLISHED[name]
    assert [getattr(ours, key) for key in SHAPES] == [theirs[key] for key in SHAPES]


def test_shapes_are_those_of_the_real_file(shared, tmp_path):
    write_config("microsoft/Phi-3-mini-4k-instruct", tmp_path)
    ours = Phi3Config.from_pretrained(tmp_path)
    theirs = json.loads((shared / "phi3-mini-4k-instruct/config.json").read_text())
    assert [getattr(ours, key) for key in SHAPES] == [theirs[key] for key in SHAPES]
