"""The model card: where a model comes from, what it learned, how near the export is, and how to use it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from phi3_lightning.checkpoint.identity import read_identity
from phi3_lightning.event_files import read_scalars
from phi3_lightning.export.certificate import ROUNDINGS, Certificate
from phi3_lightning.export.curve import draw

CURVE = "loss.svg"
FINAL = ("val/loss", "val/perplexity", "val/token_accuracy", "train/loss")
SHOWN_DATA = ("max_length", "packing", "batch_size", "max_tokens_per_batch", "train_on", "truncation", "mixture")
"""Options of the data that shaped the training; names of files and folders stay where they are."""

USE = {
    "peft": """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, "{name}")""",
    "merged": """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")""",
    "loralib": """import loralib, torch

# replace the layers that the file names by loralib.Linear(..., r, lora_alpha, merge_weights=False); lora.json has both
model.load_state_dict(torch.load("{name}/lora.pt", weights_only=True), strict=False)""",
}


@dataclass(frozen=True)
class Origin:
    """Where an exported model comes from.

    Args:
        base: The name of the base.
        checkpoint: The checkpoint's content.
        run: The run's folder, with its event files; None where it is not known.
    """

    base: str
    checkpoint: Mapping[str, Any]
    run: Path | None


def write_card(
    origin: Origin, kind: str, certificate: Certificate, serving: str | None, folder: Path, name: str
) -> None:
    """Write README.md, and the picture of the losses where the run has logged them.

    Args:
        origin: Where the model comes from.
        kind: ``peft``, ``merged`` or ``loralib``.
        certificate: How near the export is.
        serving: How a server takes it; None: as any model.
        folder: Where to.
        name: What the folder will be called.
    """
    scalars = {} if origin.run is None else read_scalars(origin.run / "tensorboard")
    step = origin.checkpoint["global_step"]
    seen = {tag: [point for point in curve if point[0] <= step] for tag, curve in scalars.items()}
    losses = {tag: seen[tag] for tag in ("train/loss", "val/loss") if seen.get(tag)}
    if losses:
        (folder / CURVE).write_text(draw(losses), encoding="utf-8")
    front = ModelCardData(
        base_model=origin.base if "/" in origin.base else None,  # the hub knows no folders
        library_name="peft" if kind == "peft" else "transformers",
        pipeline_tag="text-generation",
        tags=["phi3_lightning", "lora"],
    )
    what = {"merged": "A fine-tuned model", "peft": "A LoRA adapter", "loralib": "A LoRA adapter"}[kind]
    parts = [
        f"---\n{front.to_yaml()}\n---\n",
        f"# {name}\n",
        f"{what} on `{origin.base}`, after {step} optimiser steps, exported as {kind}.\n",
        f"## Use\n\n```python\n{USE[kind].format(name=name, base=origin.base)}\n```\n",
        *([f"{serving}\n"] if serving else []),
        *_data(origin.checkpoint),
        *_settings(origin.checkpoint),
        *_metrics(seen),
        *(["## Losses\n", f"![losses by optimiser step]({CURVE})\n"] if losses else []),
        *_certified(certificate),
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _table(title: str, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    lines = [" | ".join(map(str, row)) for row in (head, ("---",) * len(head), *rows)]
    return [f"## {title}\n", "\n".join(f"| {line} |" for line in lines) + "\n"] if rows else []


def _data(checkpoint: Mapping[str, Any]) -> list[str]:
    statistics: dict[str, dict[str, Any]] = checkpoint.get("ChatDataModule", {}).get("statistics", {})
    head = ("split", "rows read", "documents kept", "cut", "dropped", "tokens", "trained tokens")
    rows = [
        (split, found["read"], found["kept"], found["cut"], sum(found["dropped"].values()), found["tokens"],
         found["supervised_tokens"])
        for split, found in statistics.items()
    ]  # fmt: skip
    return _table("Data", head, rows)


def _settings(checkpoint: Mapping[str, Any]) -> list[str]:
    module: dict[str, Any] = checkpoint["hyper_parameters"]
    data: dict[str, Any] = checkpoint.get("datamodule_hyper_parameters", {})
    rows = [
        (f"`model.{section}.{key}`", f"`{value}`")
        for section in ("lora", "optimizer", "schedule")
        for key, value in module[section].items()
        if value is not None
    ]
    rows += [(f"`model.{key}`", f"`{module[key]}`") for key in ("dtype", "quantization") if module[key] is not None]
    rows += [(f"`data.{key}`", f"`{data[key]}`") for key in SHOWN_DATA if data.get(key) is not None]
    packages: dict[str, str] = read_identity(checkpoint)["packages"]
    rows += [(f"{name} (package)", f"`{version}`") for name, version in packages.items()]
    return _table("Settings", ("key", "value"), rows)


def _metrics(seen: dict[str, list[tuple[int, float]]]) -> list[str]:
    rows = [(f"`{tag}`", f"{seen[tag][0][1]:.4f}", f"{seen[tag][-1][1]:.4f}") for tag in FINAL if seen.get(tag)]
    return _table("Metrics", ("metric", "first", "last"), rows)


def _certified(certificate: Certificate) -> list[str]:
    rows = [
        (what, f"{found.max_logit:.3g}", f"{found.kl:.2g}", f"{found.greedy:.1%}")
        for what, found in (
            (certificate.compared, certificate.export),
            (f"one rounding a layer (the export may be {ROUNDINGS:g} times as far)", certificate.rounding),
            ("the adapter's own effect", certificate.adapter),
        )
    ]
    head = (f"over {certificate.positions} positions", "largest logit difference", "KL (nats)", "same likeliest token")
    return _table("Certificate", head, rows)
