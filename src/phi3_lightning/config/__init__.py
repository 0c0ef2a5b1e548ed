"""What the user fills in: frozen dataclasses whose ranges are checked when they are made.

The docstring under a field is its ``--help`` text. Names follow PEFT (LoRA), torch (optimisers) and transformers
(schedules, generation).
"""

from phi3_lightning.config.data import DataConfig
from phi3_lightning.config.generation import Generation
from phi3_lightning.config.lora import LoRA
from phi3_lightning.config.objective import Objective
from phi3_lightning.config.optimizer import Optimizer
from phi3_lightning.config.schedule import Schedule

__all__ = ["DataConfig", "Generation", "LoRA", "Objective", "Optimizer", "Schedule"]
