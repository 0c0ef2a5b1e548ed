"""What a type checker says of the options of the module; `make lint` runs mypy on this file."""

from phi3_lightning import Phi3LoRAModule
from phi3_lightning.config import LoRA


def sections_may_be_mappings() -> None:
    Phi3LoRAModule("base", lora={"r": 8}, optimizer={"lr": 1e-4}, schedule={}, generation={})
    Phi3LoRAModule("base", lora=LoRA(r=8))
    Phi3LoRAModule("base", lora=8)  # type: ignore[arg-type]  # where it were accepted, mypy would call this unused
