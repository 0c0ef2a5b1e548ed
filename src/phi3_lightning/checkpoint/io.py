"""Reading and writing checkpoint files so that a crash never destroys the previous one."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from phi3_lightning.errors import CheckpointError
from phi3_lightning.files import remedy
from phi3_lightning.renamed import translate

__all__ = ["SafeCheckpointIO", "read_checkpoint"]

BARE = "bare_state_dict"
"""Marks bare weights, which ``ddp_fork``, ``ddp_notebook`` and ``ddp_spawn`` send to the parent process."""


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name, flushes to the disk and renames; reads tensors and plain types alone.

    Use it as ``Trainer(plugins=[SafeCheckpointIO()])``.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; whatever happens, ``path`` is a complete file, the former or the new one."""
        if storage_options is not None:
            raise TypeError("SafeCheckpointIO takes no storage_options")
        if "state_dict" not in checkpoint:
            checkpoint = {"state_dict": checkpoint, BARE: True}
        target = Path(path)
        temporary = target.with_name(f"{target.name}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
            _flush_folder(target.parent)
        except (OSError, RuntimeError) as error:  # a full disk becomes a RuntimeError of torch's writer
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            former = "the former one is untouched" if target.exists() else "there was none before"
            reason = error.__context__ or error
            what_to_do = f"; {advice}" if (advice := remedy(reason)) else ""
            raise CheckpointError(
                f"{target}: the checkpoint could not be written ({reason}); {former}{what_to_do}"
            ) from error

    @override
    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
        """Read a checkpoint; nothing in the file can run code."""
        checkpoint = read_checkpoint(Path(path), map_location)
        return checkpoint["state_dict"] if BARE in checkpoint else checkpoint


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Return the checkpoint in ``path``, which may hold tensors and plain types alone.

    Raises:
        CheckpointError: If the file is missing, incomplete, or holds something else.
    """
    if path.is_dir():
        inside = sorted(map(str, [*path.glob("*.ckpt"), *path.glob("checkpoints/*.ckpt")]))
        files = f"; give {' or '.join(inside)}" if inside else ""
        raise CheckpointError(
            f"{path}: a folder, and no checkpoint{files}; an adapter in PEFT's form starts a run as "
            "model.lora.init_from"
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is cut or foreign
        raise CheckpointError(
            f"{path}: not a whole checkpoint of tensors and plain types ({type(error).__name__}: {error}); "
            "give another one, such as best.ckpt beside it"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(
            f"{path}: a torch file, but not a Lightning checkpoint; tensors of an adapter start a new run as "
            "model.lora.init_from"
        )
    translate(checkpoint)
    return checkpoint


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
