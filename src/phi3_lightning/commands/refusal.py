"""From an exception to the one line that the command line prints."""

from lightning.fabric.utilities.exceptions import MisconfigurationException

from phi3_lightning.callbacks.failure import is_communication
from phi3_lightning.errors import Phi3LightningError
from phi3_lightning.files import file_error


def refusal(error: BaseException) -> str | None:
    """Return what was given, where, and what to do; None for a fault of the program, which keeps its traceback."""
    if isinstance(error, Phi3LightningError):
        return "\n".join([str(error), *getattr(error, "__notes__", [])])
    if is_communication(error) and hasattr(error, "__notes__"):
        return "\n".join(error.__notes__)  # which the callback RankFailure adds
    if isinstance(error, MisconfigurationException):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        return file_error(error)
    return None
