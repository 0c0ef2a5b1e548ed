"""Layered configurations, in commands that know only some keys of a section."""

import pytest

from cli.conftest import TINY
from phi3_lightning.commands import chat, check, export


@pytest.mark.parametrize("command", [chat, check, export])
def test_a_later_configuration_replaces_keys_and_not_sections(tmp_path, command):
    (tmp_path / "recipe.yaml").write_text(
        f"""
trainer: {{accelerator: gpu, precision: bf16-mixed, gradient_clip_val: 0.5, default_root_dir: elsewhere}}
model: {{base: {TINY}}}
data: {{system: refuse, max_length: 64}}
"""
    )
    (tmp_path / "machine.yaml").write_text("trainer: {accelerator: cpu}\ndata: {max_length: 32}\n")
    named = ["--output_dir=out"] if command is export else []
    configs = [f"--config={tmp_path}/{name}.yaml" for name in ("recipe", "machine")]
    config = command.parser().parse_args([*configs, *named, "--trainer.precision=32-true"])
    assert config.trainer == {
        "accelerator": "cpu", "precision": "32-true", "gradient_clip_val": 0.5, "default_root_dir": "elsewhere"
    }  # fmt: skip
    assert config.data.get("system") == "refuse"
    assert config.data.get("max_length") == 32
