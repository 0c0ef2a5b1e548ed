"""From an exception to the one line that the command line prints of it."""

from lightning.fabric.utilities.exceptions import MisconfigurationException

from phi3_lightning.callbacks.failure import is_communication
from phi3_lightning.errors import Phi3LightningError
from phi3_lightning.files import file_error


def refusal(error: BaseException) -> str | None:
    """Say what the user can mend.

    Args:
        error: What ended a command.

    Returns:
        What was given, where, and what to do; None for a fault of the program, which is shown as it is.
    """
    if isinstance(error, Phi3LightningError):
        return "\n".join([str(error), *getattr(error, "__notes__", [])])
    if is_communication(error) and hasattr(error, "__notes__"):
        return "\n".join(error.__notes__)  # what the callback RankFailure found out
    if isinstance(error, MisconfigurationException):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        return file_error(error)
    return None
