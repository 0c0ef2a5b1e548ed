"""The model card: provenance, training, nearness to the trained model, and use of an export."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from phi3_lightning.checkpoint.identity import read_identity
from phi3_lightning.config import Objective
from phi3_lightning.config.objective import USED
from phi3_lightning.event_files import Series, read_scalars
from phi3_lightning.export.certificate import ROUNDINGS, Certificate
from phi3_lightning.hub import is_repository
from phi3_lightning.pages import render, statistics
from phi3_lightning.pages.curves import draw

PICTURE = "loss.svg"
METRICS = (
    *("val/loss", "val/perplexity", "val/token_accuracy", "val/ranking_accuracy", "val/preference_accuracy"),
    *("val/reward_margin", "train/loss"),
)
DATA_OPTIONS = ("max_length", "packing", "batch_size", "max_tokens_per_batch", "train_on", "truncation", "mixture")
"""Options of the data that shape the training; names of files and folders are not published."""


@dataclass(frozen=True)
class Provenance:
    """Where an exported model comes from."""

    base: str
    """The name of the base."""
    checkpoint: Mapping[str, Any]
    run: Path | None
    """The run's folder, with its event files; None where it is not known."""
    revision: str | None = None
    """Branch, tag or commit of the base on the hub."""


def write_card(
    provenance: Provenance,
    kind: str,
    certificate: Certificate,
    serving: str | None,
    folder: Path,
    name: str,
    *,
    whole: bool,
) -> None:
    """Write README.md, and a picture of the losses where the run has logged them, to a folder that users call ``name``.

    ``kind`` is ``peft``, ``merged``, ``loralib`` or ``gguf``; ``serving`` is what a server needs to know; ``whole``
    says that the folder holds a whole model.
    """
    scalars = {} if provenance.run is None else read_scalars(provenance.run / "tensorboard")
    step = provenance.checkpoint["global_step"]
    curves = {tag: [point for point in curve if point[0] <= step] for tag, curve in scalars.items()}
    finite = {tag: [point for point in curve if math.isfinite(point[1])] for tag, curve in curves.items()}
    losses = {tag: finite[tag] for tag in ("train/loss", "val/loss") if finite.get(tag)}
    if losses:
        (folder / PICTURE).write_text(draw(losses), encoding="utf-8")
    front_matter = ModelCardData(
        base_model=provenance.base if is_repository(provenance.base) else None,  # the hub knows no folders
        library_name=kind if kind in ("peft", "gguf") else "transformers",
        pipeline_tag="text-generation",
        tags=["phi3_lightning", "lora"],
    )
    card = render(
        "card.md",
        front_matter=front_matter.to_yaml(),
        name=name,
        base=provenance.base,
        revision=provenance.revision,
        kind=kind,
        whole=whole,
        step=step,
        serving=serving,
        statistics_columns=statistics.COLUMNS,
        statistics=statistics.rows(provenance.checkpoint.get("ChatDataModule", {}).get("statistics", {})),
        settings=_settings(provenance.checkpoint),
        metrics=_metrics(curves),
        picture=PICTURE if losses else None,
        certificate=_certificate_rows(certificate),
        certificate_positions=certificate.positions,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _settings(checkpoint: Mapping[str, Any]) -> list[tuple[str, str]]:
    module: dict[str, Any] = checkpoint["hyper_parameters"]
    data: dict[str, Any] = checkpoint.get("datamodule_hyper_parameters", {})
    unused = ("name", "betas", "eps") if module["optimizer"].get("class_path") else ("init_args",)
    options = {
        f"model.{section}.{key}": value
        for section in ("lora", "optimizer", "schedule")
        for key, value in module[section].items()
        if section != "optimizer" or key not in unused
    }
    objective = Objective(**module.get("objective", {}))  # a checkpoint of a supervised run may have none
    options |= {f"model.objective.{key}": getattr(objective, key) for key in ("name", *USED[objective.name])}
    options |= {f"model.{key}": module[key] for key in ("dtype", "quantization")}
    options |= {f"data.{key}": data.get(key) for key in DATA_OPTIONS}
    packages: dict[str, str] = read_identity(checkpoint)["packages"]
    return [
        *((f"`{key}`", f"`{value}`") for key, value in options.items() if value is not None),
        *((f"{name} (package)", f"`{version}`") for name, version in packages.items()),
    ]


def _metrics(curves: dict[str, Series]) -> list[tuple[str, str, str]]:
    return [(f"`{tag}`", f"{curves[tag][0][1]:.4f}", f"{curves[tag][-1][1]:.4f}") for tag in METRICS if curves.get(tag)]


def _certificate_rows(certificate: Certificate) -> list[tuple[str, str, str, str]]:
    differences = {
        certificate.compared: certificate.export,
        f"one rounding a layer (the export may be {ROUNDINGS:g} times as far)": certificate.rounding,
        "the adapter's own effect": certificate.adapter,
    }
    return [
        (name, f"{difference.max_logit:.3g}", f"{difference.kl:.2g}", f"{difference.greedy:.1%}")
        for name, difference in differences.items()
    ]
