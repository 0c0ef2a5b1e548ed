"""The memory of each configuration of the family under each overlay of configs/overlays: the table of docs/recipes.md.

What `plan` says of full rows on a GPU, in decimal GB; what the driver takes, about 1 GB, comes on top.
"""

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from phi3_lightning import Phi3LoRAModule
from phi3_lightning.planning.memory import MemoryPredictor
from phi3_lightning.planning.published_configs import write_config
from phi3_lightning.planning.step import BatchShape

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = {
    "phi3_mini_4k_lora": "Phi-3-mini 4k",
    "phi3_mini_128k_lora": "Phi-3-mini 128k",
    "phi35_mini_lora": "Phi-3.5-mini",
    "phi4_mini_lora": "Phi-4-mini",
    "phi4_mini_reasoning_lora": "Phi-4-mini-reasoning",
    "phi3_medium_4k_lora": "Phi-3-medium 4k",
    "phi4_lora": "Phi-4",
    "phi4_reasoning_lora": "Phi-4-reasoning",
}
OVERLAYS = {"gpu_8gb": 8, "gpu_16gb": 16, "gpu_24gb": 24, "gpu_80gb": 80, "gpus_8": 80, "cpu": 0}
"""Overlays, and the GB of a GPU that each is for."""
FITS = 0.85
"""The share of a GPU that a calculation may come to."""


def settings(*names: str) -> dict[str, Any]:
    """The configurations, each over the one before."""
    result: dict[str, Any] = {}
    for name in names:
        for section, values in yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")).items():
            result[section] = {**result.get(section, {}), **values} if isinstance(values, dict) else values
    return result


@cache
def predictor(base: str, quantization: str | None, checkpointing: str, ranks: int) -> MemoryPredictor:
    """Predicts the run of a base, of which its shapes alone are needed."""
    folder = Path(tempfile.mkdtemp(prefix="phi3-lightning-memory-"))
    write_config(base, folder)
    module = Phi3LoRAModule(str(folder), quantization=quantization, gradient_checkpointing=checkpointing)
    return MemoryPredictor(replace(module.spec(), mixed=True, ranks=ranks, process=None))


def peak(config: dict[str, Any]) -> float:
    """GB of a device, all of its rows full, everything recomputed where that is left to the device."""
    model, data = config["model"], config["data"]
    mode = model["gradient_checkpointing"]
    ranks = 2 if config["trainer"].get("strategy") == "ddp" else 1
    run = predictor(model["base"], model["quantization"], "full" if mode == "auto" else mode, ranks)
    tokens = data["batch_size"] * data["max_length"]
    memory = run.memory(BatchShape([[data["max_length"]]] * data["batch_size"], tokens))
    return (memory.total - memory.process) / 1e9


def cell(name: str, overlay: str) -> str:
    """The figure, in parentheses where it does not fit, and then after a slash with nf4 where that does."""
    size, config = OVERLAYS[overlay], settings(name, f"overlays/{overlay}")
    needed = peak(config)
    if not size or needed <= FITS * size:
        return f"{needed:.1f}"
    config["model"]["quantization"] = "nf4"
    quantized = peak(config)
    return f"({needed:.1f})" if quantized > FITS * size else f"({needed:.1f}) {quantized:.1f} with nf4"


def main() -> None:
    """Print the table."""
    print("| GB | alone | " + " | ".join(f"`{overlay}`" for overlay in OVERLAYS) + " |")
    print("|---|---:|" + "---:|" * len(OVERLAYS))
    for name, shown in MODELS.items():
        alone = f"{peak(settings(name)):.1f}"
        print(f"| {shown} | {alone} | " + " | ".join(cell(name, overlay) for overlay in OVERLAYS) + " |", flush=True)


if __name__ == "__main__":
    main()
