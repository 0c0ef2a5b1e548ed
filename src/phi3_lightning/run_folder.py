"""One folder a run, from which the same command goes on.

``runs/NAME/`` holds ``config.yaml``, ``checkpoints/``, ``tensorboard/`` and ``predictions.jsonl``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phi3_lightning.checkpoint_io import read_checkpoint
from phi3_lightning.errors import CheckpointError, ConfigError

Resume = Literal["auto", "never"]


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it writes."""

    path: Path
    """The folder."""

    @classmethod
    def named(cls, name: str, root: str | Path | None) -> "RunFolder":
        """Return the folder of a run.

        Args:
            name: The name of the run, one part of a path.
            root: The folder that holds ``runs``; None: the working directory.

        Raises:
            ConfigError: If the name is no plain folder name.
        """
        if name in ("", "..") or Path(name).name != name:
            raise ConfigError(f"run: {name!r} is no plain folder name; the folder is runs/NAME, give NAME alone")
        return cls(Path(root or ".") / "runs" / name)

    @property
    def checkpoints(self) -> Path:
        """Folder of last.ckpt and best.ckpt."""
        return self.path / "checkpoints"

    @property
    def predictions(self) -> Path:
        """File of the answers that ``predict`` writes."""
        return self.path / "predictions.jsonl"

    def newest(self, resume: Resume) -> tuple[Path, dict[str, Any]] | None:
        """Return the checkpoint from which training goes on, and its content.

        Args:
            resume: ``never`` refuses a folder that holds anything.

        Returns:
            Path and content; None where there is no checkpoint, so that training starts at step 0.

        Raises:
            CheckpointError: If there is a checkpoint that cannot be read, or ``never`` meets a used folder.
        """
        if resume == "never":
            if self.path.exists() and any(self.path.iterdir()):
                raise CheckpointError(f"--resume never: {self.path} is not empty; give another name with --run")
            return None
        last = self.checkpoints / "last.ckpt"
        if last.exists():  # a sharded one is a folder
            return last, read_checkpoint(last)
        others = sorted(self.checkpoints.glob("*.ckpt"))
        if others:
            raise CheckpointError(
                f"{self.checkpoints}: a former run left {', '.join(file.name for file in others)} and no last.ckpt; "
                f"go on from one with --ckpt_path {others[0]}, or start anew with another --run"
            )
        return None

    def evaluated(self) -> Path | None:
        """Return the checkpoint that ``validate``, ``test`` and ``predict`` take: the best, or else the newest."""
        candidates = (self.checkpoints / "best.ckpt", self.checkpoints / "last.ckpt")
        return next((path for path in candidates if path.exists()), None)

    def keep_config(self, text: str) -> None:
        """Write ``config.yaml``; a different one that is there already is kept as ``config.1.yaml`` and so on.

        Args:
            text: The configuration as YAML.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        target = self.path / "config.yaml"
        if target.exists():
            if target.read_text(encoding="utf-8") == text:
                return
            number = 1
            while (former := self.path / f"config.{number}.yaml").exists():
                number += 1
            target.rename(former)
        target.write_text(text, encoding="utf-8")


def nothing_left(checkpoint: Mapping[str, Any], max_epochs: int | None, max_steps: int) -> str | None:
    """Say why a run is over, or return None where it can go on.

    Args:
        checkpoint: The newest checkpoint.
        max_epochs: As the Trainer gets it.
        max_steps: As the Trainer gets it; -1 is no limit.
    """
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if 0 <= max_steps <= checkpoint["global_step"]:
        return f"trainer.max_steps {max_steps} is reached"
    if max_epochs is not None and 0 <= max_epochs <= epochs:
        return f"trainer.max_epochs {max_epochs} is reached"
    for name, state in checkpoint.get("callbacks", {}).items():
        if name.startswith("EarlyStopping") and state["wait_count"] >= state["patience"]:
            return f"early stopping ended it: no better value for {state['wait_count']} validations"
    return None
