"""LoRA fine-tuning of Phi-3 on chat data, as PyTorch Lightning modules."""

from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.distributed.fsdp2 import FSDP2Strategy
from phi3_lightning.module import Phi3LoRAModule

__version__ = "0.1.0"

__all__ = ["ChatDataModule", "FSDP2Strategy", "Phi3LoRAModule", "__version__"]
