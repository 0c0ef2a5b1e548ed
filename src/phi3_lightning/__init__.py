"""LoRA fine-tuning of Phi-3 on chat data, as PyTorch Lightning modules."""

import os

# torch reads it at its first allocation; without huge pages a step on a CPU has twenty times as many page faults
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.distributed.fsdp2 import FSDP2Strategy
from phi3_lightning.module import Phi3LoRAModule

__version__ = "0.1.0"

__all__ = ["ChatDataModule", "FSDP2Strategy", "Phi3LoRAModule", "__version__"]
