"""LoRA fine-tuning of Phi-3 on chat data, as PyTorch Lightning modules."""

__version__ = "0.1.0"
