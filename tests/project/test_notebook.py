"""The notebook: stored without outputs, in step with the package, and run from top to bottom where Jupyter is."""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "examples/first_steps.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def faults(code: str) -> list[str]:
    """What a cell imports and does not exist, and calls that do not fit what they call."""
    names: dict[str, object] = {}
    wrong = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                try:
                    value = getattr(module, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
                    names[alias.asname or alias.name] = value
                except ModuleNotFoundError:
                    wrong.append(f"{node.module}.{alias.name}")
    for node in ast.walk(ast.parse(code)):
        called = names.get(node.func.id) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
        if called is not None and str(getattr(called, "__module__", "")).startswith("phi3_lightning"):
            given = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            try:
                inspect.signature(called).bind_partial(*node.args, **given)
            except TypeError as error:
                wrong.append(f"{node.func.id}: {error}")
    return wrong


def test_it_is_stored_without_outputs():
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in CELLS if "outputs" in cell)
    assert str(Path.home()) not in NOTEBOOK.read_text(encoding="utf-8")


def test_it_is_in_step_with_the_package():
    assert faults("\n".join(CODE)) == []


@pytest.mark.parametrize(
    "code",
    [
        "from phi3_lightning.callbacks import LifeCurve",
        "from phi3_lightning import Phi3LoRAModule\nPhi3LoRAModule('x', lora_rank=8)",
    ],
)
def test_a_cell_that_is_out_of_step_is_found(code):
    assert faults(code) != []


def test_it_runs_from_top_to_bottom(tmp_path):
    pytest.importorskip("nbconvert", reason="no nbconvert: the extra notebook is not installed")
    (tmp_path / NOTEBOOK.name).write_bytes(NOTEBOOK.read_bytes())
    command = [sys.executable, "-m", "nbconvert", "--execute", "--to", "notebook", "--output", "run.ipynb"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(
        [*command, NOTEBOOK.name], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr[-3000:]
    outputs = [
        "".join(output.get("text", output.get("data", {}).get("text/html", "")))
        for cell in json.loads((tmp_path / "run.ipynb").read_text())["cells"]
        for output in cell.get("outputs", [])
    ]
    text = "\n".join(outputs)
    assert "lantern lit" in outputs[-1]  # the bookshop's manner, from plain PEFT
    assert text.count("<svg") == 2  # a curve for each fit
    assert text.count("val/chrf") == 2  # scores of answers for each
    assert "&lt;span class=&quot;trained" in text  # the preview
    assert (tmp_path / "runs/notebook/adapter/certificate.json").is_file()
