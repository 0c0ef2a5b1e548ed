"""The options of ChatDataModule, typed, with their ranges."""

from dataclasses import dataclass
from typing import Literal

from phi3_lightning.errors import ConfigError

Files = str | list[str]
Split = Literal["train", "val", "test", "predict"]

_LEAST = {"max_length": 2, "batch_size": 1, "num_workers": 0, "num_proc": 1}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What ``ChatDataModule`` was given; its docstring says what each option means.

    Raises:
        ConfigError: A value is out of its range.
    """

    train: Files | None
    val: Files | None
    val_fraction: float
    test: Files | None
    predict: Files | None
    tokenizer: str | None
    revision: str | None
    max_length: int
    packing: bool
    batch_size: int
    num_workers: int
    num_proc: int
    on_bad_row: Literal["raise", "skip"]
    overlong: Literal["drop"]
    cache_dir: str | None
    seed: int | None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"data.{name}: {value} is too small; give {least} or more.")
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(f"data.val_fraction: {self.val_fraction} is not in [0, 1); 0.05 is usual.")

    def files(self, split: Split) -> Files | None:
        """The files of a split.

        Args:
            split: Which one.

        Returns:
            What was given for it.
        """
        return {"train": self.train, "val": self.val, "test": self.test, "predict": self.predict}[split]

    def needed(self, stage: str | None) -> list[Split]:
        """The files that a stage reads. Validation data may be a share of the training data.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None: whatever files are given.

        Returns:
            The splits.

        Raises:
            ConfigError: One of them was not given.
        """
        given: list[Split] = [split for split in ("train", "val", "test", "predict") if self.files(split) is not None]
        if stage is None:
            return given
        own_val = self.val is not None or self.val_fraction == 0
        needed: dict[str, list[Split]] = {
            "fit": ["train"] if self.val is None else ["train", "val"],
            "validate": ["val"] if own_val else ["train"],
            "test": ["test"],
            "predict": ["predict"],
        }
        for split in needed[stage]:
            if split not in given:
                raise ConfigError(f"data.{split}: not given; name a file or a data set to {stage} with.")
        return needed[stage]
