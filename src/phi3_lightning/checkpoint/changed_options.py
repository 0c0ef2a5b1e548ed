"""How the present options differ from those that a checkpoint was trained with."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

HONOURED = (
    "model.optimizer.lr", "model.optimizer.loraplus_lr_ratio", "model.optimizer.weight_decay", "model.optimizer.betas",
    "model.optimizer.eps", "model.schedule", "model.neftune_noise_alpha", "model.lora.lora_dropout",
)  # fmt: skip
"""Options whose present values a resumed run takes; it is the same run with them."""

IRRELEVANT = (
    "model.base_id", "model.attn_implementation", "model.gradient_checkpointing", "model.torch_compile",
    "model.generation",
    "data.val", "data.test", "data.predict", "data.predict_batch_size", "data.num_workers", "data.num_proc",
    "data.on_bad_row", "data.cache_dir",
)  # fmt: skip
"""Options that do not influence what is learnt."""

SECTIONS = ("model", "data", "model.lora", "model.objective", "model.optimizer", "model.schedule")
"""Sections that are compared key by key; any other dictionary is one value."""


class Changed(NamedTuple):
    """An option, by its key path, that has another value now than the checkpoint was trained with."""

    option: str
    now: Any
    former: Any

    def __str__(self) -> str:
        return f"{self.option} is {self.now} and was {self.former}"

    @property
    def makes_another_run(self) -> bool:
        """Whether a run with it is another run, rather than the same one resumed with another setting."""
        return not _within(self.option, HONOURED)


def changed_options(checkpoint: Mapping[str, Any], model: Mapping[str, Any], data: Mapping[str, Any]) -> list[Changed]:
    """Return the options that influence what is learnt and have changed; what a checkpoint lacks is not compared."""
    changed = [
        *_pairs("model", model, checkpoint.get("hyper_parameters", {})),
        *_pairs("data", data, checkpoint.get("datamodule_hyper_parameters", {})),
    ]
    order, seed = checkpoint.get("ChatDataModule"), int(os.environ.get("PL_GLOBAL_SEED", "0"))
    if order and data["seed"] is None and order["seed"] != seed:
        changed.append(Changed("seed_everything", seed, order["seed"]))
    return [each for each in changed if not _within(each.option, IRRELEVANT)]


def _pairs(path: str, now: Any, former: Any) -> Iterator[Changed]:
    if path in SECTIONS:
        for key in (key for key in now if key in former):
            yield from _pairs(f"{path}.{key}", now[key], former[key])
    elif not _same(now, former):
        yield Changed(path, now, former)


def _same(now: Any, former: Any) -> bool:
    if isinstance(now, list | tuple) and isinstance(former, list | tuple):
        return len(now) == len(former) and all(map(_same, now, former))
    if isinstance(now, str) and isinstance(former, str):
        return now == former or Path(now).resolve() == Path(former).resolve()
    return bool(now == former)


def _within(option: str, sections: tuple[str, ...]) -> bool:
    return any(option == section or option.startswith(f"{section}.") for section in sections)
