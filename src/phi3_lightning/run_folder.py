"""One folder for each run, in which the same command resumes.

``runs/NAME/`` holds ``config.yaml``, ``checkpoints/``, ``tensorboard/`` and ``predictions.jsonl``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from phi3_lightning.checkpoint.callback_state import OPTIONS
from phi3_lightning.checkpoint.changed_options import Changed
from phi3_lightning.checkpoint.io import read_checkpoint
from phi3_lightning.errors import CheckpointError, ConfigError
from phi3_lightning.files import local_path
from phi3_lightning.run_lock import LOCK

Resume = Literal["auto", "never"]

IMMEDIATE_REASONS = (
    EarlyStoppingReason.STOPPING_THRESHOLD.value,
    EarlyStoppingReason.DIVERGENCE_THRESHOLD.value,
    EarlyStoppingReason.NON_FINITE_METRIC.value,
)
"""The reasons for which early stopping ends a run without waiting for its patience."""

ORDER_OPTIONS = ("data.batch_size", "data.packing", "data.seed", "seed_everything")
"""Options that determine the order of batches, whatever the data."""

THRESHOLDS = ("stopping_threshold", "divergence_threshold", "check_finite")
"""The options that determine these reasons."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, and the places of its files."""

    path: Path
    checkpoints: Path
    """The folder of last.ckpt and best.ckpt."""

    @classmethod
    def named(cls, name: str, root: str | Path | None, dirpath: str | Path | None = None) -> "RunFolder":
        """Return the folder of a run.

        Args:
            root: The folder that holds ``runs``; None: the working directory.
            dirpath: The folder of the checkpoints; None: ``checkpoints`` in the run's folder.

        Raises:
            ConfigError: If the name is no plain folder name, or a folder is an address.
        """
        if name in ("", "..") or Path(name).name != name:
            raise ConfigError(f"run: {name!r} is no plain folder name; the folder is runs/NAME, give NAME alone")
        path = local_path("trainer.default_root_dir", root or ".") / "runs" / name
        return cls(path, path / "checkpoints" if dirpath is None else local_path("checkpoint.dirpath", dirpath))

    @classmethod
    def of(cls, config: Namespace) -> "RunFolder":
        """Return the folder of the run that a configuration describes; its section ``checkpoint`` may be empty."""
        return cls.named(config.run, config.trainer.get("default_root_dir"), (config.checkpoint or {}).get("dirpath"))

    @property
    def predictions(self) -> Path:
        """The file to which ``predict`` writes."""
        return self.path / "predictions.jsonl"

    def newest(self, resume: Resume) -> tuple[Path, dict[str, Any]] | None:
        """Return path and content of the checkpoint from which training resumes; None: training starts at step 0.

        Raises:
            CheckpointError: If there is a checkpoint that cannot be read, or ``never`` meets a used folder.
        """
        if resume == "never":
            if self.path.exists() and any(entry.name != LOCK for entry in self.path.iterdir()):
                raise CheckpointError(f"--resume never: {self.path} is not empty; give another name with --run")
            return None
        last = self.checkpoints / "last.ckpt"
        if last.exists():
            return last, read_checkpoint(last)
        others = self._names()
        if others:
            raise CheckpointError(
                f"{self.checkpoints}: a former run left {', '.join(others)} and no last.ckpt; "
                f"resume from one with --ckpt_path {self.checkpoints / others[0]}, or start with another --run"
            )
        return None

    def checkpoint(self, ckpt_path: str | Path | None) -> Path | None:
        """Return the checkpoint that ``--ckpt_path`` means; None where it names none and the run has none.

        Args:
            ckpt_path: Lightning's words ``last``, ``best`` and ``hpc``, a path, or None for the best or else the last.

        Raises:
            CheckpointError: If there is no such checkpoint.
            ConfigError: If it is an address.
        """
        best, last = self.checkpoints / "best.ckpt", self.checkpoints / "last.ckpt"
        if ckpt_path is None:
            return next((path for path in (best, last) if path.exists()), None)
        if not str(ckpt_path):
            raise CheckpointError("--ckpt_path: nothing was given; leave the option out, or give last, best or a path")
        by_word = {"last": last, "best": best, "hpc": self._newest_of_lightning()}
        path = by_word.get(str(ckpt_path)) or local_path("--ckpt_path", ckpt_path)
        if not path.exists():
            place = f"--ckpt_path {ckpt_path}: {path}" if str(ckpt_path) in by_word else str(path)
            rest = f"the run has {', '.join(self._names()) or 'no checkpoint'} in {self.checkpoints}"
            raise CheckpointError(f"{place}: there is no such checkpoint; {rest}; give last, best or a path")
        return path

    def _names(self) -> list[str]:
        return sorted(file.name for file in self.checkpoints.glob("*.ckpt"))

    def _newest_of_lightning(self) -> Path:
        """The file that Lightning itself writes when SLURM requeues a job."""
        root = self.path.parent.parent
        numbers = [int(file.stem[9:]) for file in root.glob("hpc_ckpt_*.ckpt") if file.stem[9:].isdecimal()]
        return root / f"hpc_ckpt_{max(numbers, default=1)}.ckpt"

    def finished(self, why: str, changed: Sequence[Changed]) -> str:
        """Return why the run is over, and which options of this start had no effect.

        Raises:
            CheckpointError: If the options that changed make it another run than the one that is over.
        """
        listing = "; ".join(map(str, changed))
        if any(each.makes_another_run for each in changed):
            raise CheckpointError(
                f"{self.path}: nothing was trained: the run there is over ({why}), and it is another one: {listing}. "
                "Start this one with another --run"
            )
        return f"{why}. Changed options had no effect: {listing}" if changed else why

    def check_order(self, checkpoint: Mapping[str, Any], changed: Sequence[Changed]) -> None:
        """Check, before anything is loaded, that a run stopped within an epoch can continue its order of batches.

        Raises:
            CheckpointError: If it depends on an option that has changed.
        """
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        changes = [each for each in changed if each.option in ORDER_OPTIONS]
        if changes and progress["current"]["ready"] > 0 and not progress["is_last_batch"]:
            raise CheckpointError(
                f"{self.path}: the checkpoint stopped within an epoch whose order cannot be continued: "
                f"{'; '.join(map(str, changes))}. Give it as it was, or another --run"
            )

    def keep_config(self, text: str) -> None:
        """Write ``config.yaml``; a different earlier one is renamed to ``config.1.yaml`` and so on."""
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


def nothing_left(
    checkpoint: Mapping[str, Any], max_epochs: int | None, max_steps: int, callbacks: Iterable[Callback] = ()
) -> str | None:
    """Return why the run with this newest checkpoint is over, or None where it can continue.

    Args:
        max_epochs: As the Trainer gets it.
        max_steps: As the Trainer gets it; -1 is no limit.
        callbacks: Those of this start, whose options decide; those of the checkpoint alone end nothing.
    """
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if 0 <= max_steps <= checkpoint["global_step"]:
        return f"trainer.max_steps {max_steps} is reached"
    if max_epochs is not None and 0 <= max_epochs <= epochs:
        return f"trainer.max_epochs {max_epochs} is reached"
    states = checkpoint.get("callbacks", {})
    for callback in callbacks:
        state = states.get(callback.state_key)
        if not isinstance(callback, EarlyStopping) or not isinstance(state, Mapping):
            continue
        wait_count = state.get("wait_count", 0)  # a subclass may have a state of its own
        if wait_count >= callback.patience:
            return f"early stopping ended it: no better {callback.monitor} for {wait_count} validations"
        former = checkpoint.get(OPTIONS, {}).get(callback.state_key, {})
        unchanged = all(name in former and former[name] == getattr(callback, name) for name in THRESHOLDS)
        if unchanged and state.get("stopping_reason") in IMMEDIATE_REASONS:
            return f"early stopping ended it: {state['stopping_reason_message']}"
    return None
