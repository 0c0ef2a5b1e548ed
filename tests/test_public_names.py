"""The names that others may lean on: taking one away, or adding one, is a decision that shows here."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import phi3_lightning

SOURCES = Path(phi3_lightning.__file__).parents[1]

PUBLIC = {
    "phi3_lightning": {"ChatDataModule", "FSDP2Strategy", "Phi3LoRAModule", "__version__"},
    "phi3_lightning.adapters": {"attach", "check"},
    "phi3_lightning.batch": {"IGNORE_INDEX", "Batch", "PromptBatch"},
    "phi3_lightning.callbacks": {
        "AdapterStatistics",
        "AgreedStop",
        "AutoBatchSize",
        "AutoCheckpointing",
        "BadRows",
        "EvaluationReport",
        "BaseDrift",
        "LineProgress",
        "Monitor",
        "OutOfMemory",
        "PredictionWriter",
        "PurgeOvertaken",
        "RankFailure",
        "RunCheckpoint",
        "TensorBoardSamples",
        "RunReport",
        "Samples",
        "SingleWriter",
        "Throughput",
    },
    "phi3_lightning.checkpoint.io": {"SafeCheckpointIO", "read_checkpoint"},
    "phi3_lightning.config": {"DataConfig", "Generation", "LoRA", "Optimizer", "Schedule"},
    "phi3_lightning.contracts": {"DescribedData", "HasTokenizer", "Origin", "PlannedData"},
    "phi3_lightning.errors": {
        "CheckpointError",
        "ConfigError",
        "DataError",
        "DivergenceError",
        "ModelError",
        "Phi3LightningError",
    },
    "phi3_lightning.metrics": {"Answer", "AnswerMetric", "AnswerMetrics", "Perplexity", "TokenMean", "TokenMetrics"},
    "phi3_lightning.checkpoint.mixin": {"TrainableStateMixin"},
    "phi3_lightning.accumulation": {"TokenWeightedModule"},
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_pinned(name):
    module = import_module(name)
    assert set(module.__all__) == PUBLIC[name]
    assert all(hasattr(module, public) for public in PUBLIC[name])


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    module = import_module(name)
    things = [getattr(module, public) for public in PUBLIC[name]]
    assert [thing for thing in things if callable(thing) and not thing.__doc__] == []


@pytest.mark.slow
def test_sections_may_be_mappings_for_a_type_checker(tmp_path):
    script = tmp_path / "script.py"
    lines = ["from phi3_lightning import Phi3LoRAModule", "from phi3_lightning.config import LoRA"]
    lines += ['Phi3LoRAModule("base", lora={"r": 8}, optimizer={"lr": 1e-4}, schedule={}, generation={})']
    lines += ['Phi3LoRAModule("base", lora=LoRA(r=8))', 'Phi3LoRAModule("base", lora=8)']
    script.write_text("\n".join(lines))
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", f"--cache-dir={tmp_path}", script]
    told = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(SOURCES)})
    errors = [line for line in told.stdout.splitlines() if line.startswith(str(script))]
    assert len(errors) == 1, told.stdout + told.stderr
    assert "script.py:5: error" in errors[0]
