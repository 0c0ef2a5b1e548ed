"""The memory of each configuration of the family under each overlay of configs/overlays: the table of docs/recipes.md.

A calculation, from the formulas of docs/scaling.md, in decimal GB; what the driver takes, about 1 GB, comes on top.
"""

from pathlib import Path
from typing import Any

import yaml

from scaling import Model

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = {
    "phi3_mini_4k_lora": Model("Phi-3-mini 4k", 3072, 8192, 32, 32, 32),
    "phi3_mini_128k_lora": Model("Phi-3-mini 128k", 3072, 8192, 32, 32, 32),
    "phi35_mini_lora": Model("Phi-3.5-mini", 3072, 8192, 32, 32, 32),
    "phi4_mini_lora": Model("Phi-4-mini", 3072, 8192, 32, 24, 8, vocabulary=200064, tied=True),
    "phi3_medium_4k_lora": Model("Phi-3-medium 4k", 5120, 17920, 40, 40, 10),
}
OVERLAYS = {"gpu_8gb": 8, "gpu_16gb": 16, "gpu_24gb": 24, "gpu_80gb": 80, "gpus_8": 80, "cpu": 0}
"""Overlays, and the GB of a GPU that each is for."""

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits with double quantisation: an 8-bit scale for 64, a float32 for 256 of those."""
KEPT = 1.4
"""What a layer keeps without checkpointing, in units of the formula: 1.20 to 1.34 counted, with LoRA dropout."""
FITS = 0.85
"""The share of a GPU that a calculation may come to."""


def settings(*names: str) -> dict[str, Any]:
    """The configurations, each over the one before."""
    result: dict[str, Any] = {}
    for name in names:
        for section, values in yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")).items():
            result[section] = {**result.get(section, {}), **values} if isinstance(values, dict) else values
    return result


def base_bytes(model: Model, quantization: str | None) -> float:
    """Of the frozen weights; linear layers in 4 bits, and one of them in full at a time, where they are quantised."""
    if quantization is None:
        return 2 * model.base
    linear = model.layers * sum(a * b for a, b in model.shapes)
    return NF4 * linear + 2 * (model.base - linear) + 2 * max(a * b for a, b in model.shapes)


def peak(model: Model, config: dict[str, Any]) -> float:
    """GB of a device: base, adapter with gradient and two moments, and what a micro-batch leaves behind."""
    tokens = config["data"]["batch_size"] * config["data"]["max_length"]
    if config["model"]["gradient_checkpointing"] == "full":
        batch = model.activations(tokens)
    else:
        batch = KEPT * model.layers * model.in_layer(tokens) + model.logits
    adapter = (20 if config["trainer"].get("strategy") == "ddp" else 16) * model.adapter
    return (base_bytes(model, config["model"]["quantization"]) + adapter + batch) / 1e9


def cell(name: str, overlay: str) -> str:
    """The figure, in parentheses where it does not fit, and then after a slash with nf4 where that does."""
    size, config = OVERLAYS[overlay], settings(name, f"overlays/{overlay}")
    needed = peak(MODELS[name], config)
    if not size or needed <= FITS * size:
        return f"{needed:.1f}"
    config["model"]["quantization"] = "nf4"
    quantized = peak(MODELS[name], config)
    return f"({needed:.1f})" if quantized > FITS * size else f"({needed:.1f}) {quantized:.1f} with nf4"


def main() -> None:
    """Print the table."""
    print("| GB | alone | " + " | ".join(f"`{overlay}`" for overlay in OVERLAYS) + " |")
    print("|---|---:|" + "---:|" * len(OVERLAYS))
    for name, model in MODELS.items():
        alone = f"{peak(model, settings(name)):.1f}"
        print(f"| {model.name} | {alone} | " + " | ".join(cell(name, overlay) for overlay in OVERLAYS) + " |")


if __name__ == "__main__":
    main()
