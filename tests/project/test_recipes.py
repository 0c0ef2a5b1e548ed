"""The figures in the guide to recipes and in the overlays are those that the script calculates."""

import re
import runpy
import subprocess
import sys

import pytest

from cli.conftest import REPOSITORY

OVERLAYS = REPOSITORY / "configs/overlays"


@pytest.fixture
def memory(monkeypatch) -> dict:
    """What benchmarks/memory.py defines."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return runpy.run_path(str(REPOSITORY / "benchmarks/memory.py"))


def test_the_guide_has_the_table_that_the_script_prints():
    command = [sys.executable, str(REPOSITORY / "benchmarks/memory.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.strip() in (REPOSITORY / "docs/recipes.md").read_text()


def test_each_overlay_says_what_the_script_calculates(memory):
    shown = {
        "Phi-3-mini": "phi3_mini_4k_lora",
        "Phi-3-medium": "phi3_medium_4k_lora",
        "Phi-4-mini": "phi4_mini_lora",
        "Phi-4": "phi4_lora",
    }
    for overlay, size in memory["OVERLAYS"].items():
        text = (OVERLAYS / f"{overlay}.yaml").read_text()
        said = re.findall(r"(Phi-\d(?:-\w+)?)( with --model.quantization nf4)? (\d+\.\d) GB", text.replace("\n#", ""))
        assert len(said) >= 2
        for model, quantized, number in said:
            config = memory["settings"](shown[model], f"overlays/{overlay}")
            if quantized:
                config["model"]["quantization"] = "nf4"
            peak = memory["peak"](config)
            assert f"{peak:.1f}" == number
            assert not size or peak <= memory["FITS"] * size
