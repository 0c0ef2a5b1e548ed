"""The public names: removing or adding one is a decision that shows here."""

from importlib import import_module

import pytest

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
        "Evaluation",
        "EvaluationReport",
        "BaseDrift",
        "LineProgress",
        "LiveCurve",
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
        "ValidationAnswers",
    },
    "phi3_lightning.checkpoint.io": {"SafeCheckpointIO", "read_checkpoint"},
    "phi3_lightning.config": {"DataConfig", "Generation", "LoRA", "Objective", "Optimizer", "Schedule"},
    "phi3_lightning.contracts": {"DataOfOneKind", "DescribedData", "HasTokenizer", "Origin", "PlannedData"},
    "phi3_lightning.errors": {
        "CheckpointError",
        "ConfigError",
        "DataError",
        "DivergenceError",
        "ModelError",
        "Phi3LightningError",
    },
    "phi3_lightning.metrics": {
        "Answer",
        "AnswerMetric",
        "AnswerMetrics",
        "MeanDifference",
        "Perplexity",
        "PreferenceMetrics",
        "RankingByLabel",
        "TokenMean",
        "TokenMetrics",
    },
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
