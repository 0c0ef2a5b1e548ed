"""The exceptions that the package raises for what a user can fix.

Each message says what was given, where (file and line, or key path), and what to do.
"""

__all__ = ["CheckpointError", "ConfigError", "DataError", "DivergenceError", "ModelError", "Phi3LightningError"]


class Phi3LightningError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(Phi3LightningError, ValueError):
    """An option has a value that cannot work; the message names its key path."""


class DataError(Phi3LightningError, ValueError):
    """A file or a row cannot be used; the message names file and line."""


class ModelError(Phi3LightningError, ValueError):
    """A base model cannot be used, or an adapter cannot be attached to it."""


class CheckpointError(Phi3LightningError, RuntimeError):
    """A checkpoint cannot be read, or does not belong to this run."""


class DivergenceError(Phi3LightningError, RuntimeError):
    """Training produced a loss or a gradient that is not finite; no weight was changed by it."""

    def __init__(self, message: str, document_ids: list[int]) -> None:
        super().__init__(message)
        self.document_ids = document_ids
        """The documents of the accumulation window in which it happened, as the batches name them."""
