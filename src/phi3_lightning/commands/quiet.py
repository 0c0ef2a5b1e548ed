"""Silences output of upstream libraries that no user of the command line needs."""

import logging
import sys
import threading
import warnings

from transformers.utils.logging import disable_progress_bar

from phi3_lightning.files import remedy


def quieten_libraries() -> None:
    """Silence what libraries tell their own developers, or advertise."""
    warnings.filterwarnings("ignore", message="`isinstance\\(treespec, LeafSpec\\)` is deprecated")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT reads it
    warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback with a model")  # it shares it
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
    threading.excepthook = _thread_failed
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # one line for each 8-bit product
    if not sys.stderr.isatty():
        disable_progress_bar()  # of loading weights, which writes control characters into logs


def quieten_trainers() -> None:
    """Silence Lightning's lines about data and Trainers, for commands whose own tables have what counts."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers", UserWarning)
    warnings.filterwarnings("ignore", ".*smaller than the logging interval", UserWarning)
    warnings.filterwarnings("ignore", "You defined a `validation_step` but have no", UserWarning)


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Silence the error of TensorBoard's thread on a full disk, since its writer raises it again."""
    if remedy(failure.exc_value) is None:
        threading.__excepthook__(failure)
