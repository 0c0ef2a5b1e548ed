"""Reading and writing checkpoint files so that a crash never costs the one before."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from phi3_lightning.errors import CheckpointError
from phi3_lightning.sharded_checkpoint import is_sharded, read_sharded


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name, flushes to the disk and renames; reads tensors and plain types alone.

    Use it as ``Trainer(plugins=[SafeCheckpointIO()])``.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; whatever happens, ``path`` is a whole file: the former one, or the new one.

        Args:
            checkpoint: What to write.
            path: Where to.
            storage_options: Refused, as in Lightning's own class.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        if storage_options is not None:
            raise TypeError("SafeCheckpointIO takes no storage_options")
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
        except OSError as error:
            temporary.unlink(missing_ok=True)
            former = "the former one is untouched" if target.exists() else "there was none before"
            raise CheckpointError(f"{target}: the checkpoint could not be written ({error}); {former}") from error

    @override
    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
        """Read a checkpoint; nothing in the file can run code.

        Args:
            path: The file.
            map_location: As in :func:`torch.load`.
            weights_only: Must not be false.

        Raises:
            CheckpointError: If the file is missing, incomplete, or holds more than tensors and plain types.
        """
        return read_checkpoint(Path(path), map_location)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Return the checkpoint in ``path``, which may hold tensors and plain types alone.

    Args:
        path: The file, or the folder of a sharded checkpoint.
        map_location: As in :func:`torch.load`.

    Raises:
        CheckpointError: If the file is missing, incomplete, or holds something else.
    """
    if is_sharded(path):
        return read_sharded(path)
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
        raise CheckpointError(f"{path}: a torch file, but not a Lightning checkpoint")
    return checkpoint


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
