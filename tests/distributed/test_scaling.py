"""The tables in the documentation follow from the formulas."""

import subprocess
import sys

from cli.conftest import REPOSITORY
from phi3_lightning.adapters import targets
from phi3_lightning.config import LoRA
from phi3_lightning.model.base import read_config, skeleton


def test_the_tables_of_the_guide_are_what_the_script_prints():
    script = [sys.executable, str(REPOSITORY / "benchmarks/scaling.py")]
    printed = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    assert printed.strip() in (REPOSITORY / "docs/scaling.md").read_text()


def test_the_script_counts_the_parameters_of_the_real_model(shared):
    model = skeleton(read_config(str(shared / "phi3-mini-4k-instruct")))
    values = sum(parameter.numel() for parameter in model.parameters())
    adapted = targets.resolve(model, LoRA(target_modules="all-linear"))
    linear = [model.get_submodule(target.path) for target in adapted]
    adapter = sum(16 * (layer.in_features + layer.out_features) for layer in linear)
    line = f"Phi-3-mini: {values:,} base and {adapter:,} trained parameters"
    assert line in (REPOSITORY / "docs/scaling.md").read_text()
