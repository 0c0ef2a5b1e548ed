"""Callbacks that the command line adds to a run; each works in any Trainer."""

from phi3_lightning.callbacks.adapter_statistics import AdapterStatistics
from phi3_lightning.callbacks.auto import AutoBatchSize, AutoCheckpointing
from phi3_lightning.callbacks.bad_rows import BadRows
from phi3_lightning.callbacks.base_drift import BaseDrift
from phi3_lightning.callbacks.checkpoint import RunCheckpoint
from phi3_lightning.callbacks.evaluation import EvaluationReport
from phi3_lightning.callbacks.evaluation_options import Evaluation
from phi3_lightning.callbacks.failure import RankFailure
from phi3_lightning.callbacks.live_curve import LiveCurve
from phi3_lightning.callbacks.monitor import Monitor
from phi3_lightning.callbacks.out_of_memory import OutOfMemory
from phi3_lightning.callbacks.predictions import PredictionWriter
from phi3_lightning.callbacks.progress import LineProgress
from phi3_lightning.callbacks.purge import PurgeOvertaken
from phi3_lightning.callbacks.report import RunReport
from phi3_lightning.callbacks.samples import Samples
from phi3_lightning.callbacks.single_writer import SingleWriter
from phi3_lightning.callbacks.stop import AgreedStop
from phi3_lightning.callbacks.tensorboard_samples import TensorBoardSamples
from phi3_lightning.callbacks.throughput import Throughput
from phi3_lightning.callbacks.validation_answers import ValidationAnswers

__all__ = [
    "AdapterStatistics",
    "AgreedStop",
    "AutoBatchSize",
    "AutoCheckpointing",
    "BadRows",
    "BaseDrift",
    "Evaluation",
    "EvaluationReport",
    "LineProgress",
    "LiveCurve",
    "Monitor",
    "OutOfMemory",
    "PredictionWriter",
    "PurgeOvertaken",
    "RankFailure",
    "RunCheckpoint",
    "RunReport",
    "Samples",
    "SingleWriter",
    "TensorBoardSamples",
    "Throughput",
    "ValidationAnswers",
]
