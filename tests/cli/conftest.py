"""Runs the command line in processes forked from this one, which has already imported everything."""

import functools
import io
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import datasets  # noqa: F401  commands import these late: once here, and not in every process
import docstring_parser
import pytest
import torch.utils.tensorboard  # noqa: F401
from peft.utils import transformers_weight_conversion  # noqa: F401
from tqdm import tqdm

from phi3_lightning.cli import Phi3CLI, main

REPOSITORY = Path(__file__).parents[2]
TINY = REPOSITORY / "src/phi3_lightning/assets/tiny_phi3"


@dataclass
class Run:
    """One call of the command line, in a process of its own."""

    pid: int
    output: Path
    status: int | None = None

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def wait(self, seconds: float = 120) -> int:
        self.wait_for(lambda: self.poll() is not None, seconds)
        return self.status

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait until a condition holds; kill the run when that takes too long."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end or (self.poll() is not None and not condition()):
                self.kill(signal.SIGKILL)
                raise AssertionError(f"waited in vain; the run printed:\n{self.text}")
            time.sleep(0.005)

    def kill(self, with_signal: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, with_signal)


@functools.cache
def _read_option_texts() -> None:
    """Parse the docstrings that are the options' help once here, and not in every process, where it takes longest."""
    docstring_parser.parse_from_object = functools.cache(docstring_parser.parse_from_object)
    with suppress(SystemExit), redirect_stdout(io.StringIO()), patch.object(sys, "argv", ["cli.py", "fit", "--help"]):
        Phi3CLI()


def start(folder: Path, *args: str) -> Run:
    """Fork a process that runs the command line in ``folder``."""
    _read_option_texts()
    output = folder / f"output-{time.monotonic_ns()}.txt"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process ignores it
            os.chdir(folder)
            sink = os.open(output, os.O_WRONLY | os.O_CREAT)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            # where Lightning's launcher starts further ranks as `python cli.py`, and not as `python -m pytest`
            sys.argv = [str(REPOSITORY / "cli.py"), *args]
            sys.modules["__main__"].__spec__ = None
            os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "src")}
            sys.path.insert(0, str(folder))
            warnings.resetwarnings()  # as in a user's process
            threading.excepthook = threading.__excepthook__  # and not pytest's
            tqdm.set_lock(threading.RLock())  # its own is shared with all forks, and a killed one may hold it for ever
            logging.getLogger("lightning.pytorch").handlers = [logging.StreamHandler(sys.stderr)]
            for logger in ("lightning.pytorch", "lightning.fabric"):
                logging.getLogger(logger).setLevel(logging.INFO)  # commands run in this process lower it
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    run = Run(pid, output)
    while not output.exists():
        time.sleep(0.001)
    return run


@pytest.fixture
def cli(tmp_path) -> Callable[..., Run]:
    """Run a command to its end: ``cli("fit", "--config", ...)``."""

    def run(*args: str, code: int | None = 0) -> Run:
        finished = start(tmp_path, *args)
        finished.wait()
        if code is not None:
            assert finished.status == code, finished.text
        return finished

    return run


QUICK = (
    "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.log_every_n_steps=1", f"--model.base={TINY}",
    f"--data.train={TINY}/chats_train.jsonl", f"--data.val={TINY}/chats_val.jsonl", "--data.max_length=256",
    "--data.batch_size=1", "--data.num_workers=0", "--model.gradient_checkpointing=none", "--model.optimizer.lr=0.01",
    "--model.generation.max_new_tokens=8", "--monitor.base_drift=false", "--monitor.samples=0",
)  # fmt: skip
"""Options of a run on the tiny model that takes a second or two."""
