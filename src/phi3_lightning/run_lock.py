"""One writer at a time in a run's folder."""

import errno
import fcntl
import json
import os
import socket
import threading
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from phi3_lightning.errors import ConfigError

LOCK = ".lock"
"""The file in the folder that names its writer."""

BEAT_SECONDS = 20.0
PATIENCE_SECONDS = 120.0
"""On a file system without locks: how often a writer touches the file, and after which silence it counts as dead."""


class RunLock:
    """The right to write in a folder, which one process has at a time.

    It is a lock of the system (``fcntl.lockf``), which ends with the process, however that ends; forked processes do
    not inherit it. On a file system without locks the holder touches the file instead, and counts as dead after two
    minutes without.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._path = self.folder / LOCK
        self._new_folders: list[Path] = []
        self._owner: int | None = None
        self._descriptor: int | None = None
        self._over = threading.Event()

    @property
    def held(self) -> bool:
        """Whether this object has the right, in this process or in the one that it was forked from."""
        return self._owner is not None

    def acquire(self) -> None:
        """Take the right.

        Raises:
            ConfigError: If another process has it; the message names process, host and time.
            OSError: If nothing can be written in the folder.
        """
        self._new_folders = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._lock():
                pass  # the file was removed between opening and locking it
        except BaseException:
            self.release()
            self._remove_new_folders()
            raise

    def release(self) -> None:
        """Release the right, and remove the folders that ``acquire`` made, if they are empty."""
        if self._owner != os.getpid():
            return
        self._owner = None
        self._over.set()
        with suppress(OSError):
            self._path.unlink()  # while it is still locked
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._remove_new_folders()

    def _remove_new_folders(self) -> None:
        with suppress(OSError):
            for folder in self._new_folders:
                folder.rmdir()

    def _lock(self) -> bool:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise self._refusal() from None
            self._lock_by_heartbeat()
            return True
        if not self._path.exists() or not os.path.samestat(os.fstat(descriptor), self._path.stat()):
            os.close(descriptor)
            return False
        self._descriptor, self._owner = descriptor, os.getpid()
        os.truncate(descriptor, 0)
        os.write(descriptor, _signature())  # not by its name: closing another descriptor would release the lock
        return True

    def _lock_by_heartbeat(self) -> None:
        own = self._path.with_name(f"{LOCK}.{socket.gethostname()}.{os.getpid()}")
        own.write_bytes(_signature())
        silence = own.stat().st_mtime - self._path.stat().st_mtime  # both by the clock of the file system
        if self._path.stat().st_size and silence < PATIENCE_SECONDS:
            own.unlink()
            raise self._refusal()
        own.replace(self._path)
        self._owner = os.getpid()
        self._over.clear()
        threading.Thread(target=self._beat, daemon=True, name="run-lock").start()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with suppress(OSError):  # the file system is away for a while
                os.utime(self._path)

    def _refusal(self) -> ConfigError:
        try:
            holder = json.loads(self._path.read_text(encoding="utf-8"))
            who = f"process {holder['process']} on {holder['host']} has been writing there since {holder['since']}"
        except (OSError, ValueError):  # it has only just started, or has ended
            who = "another process is writing there"
        return ConfigError(f"run: {self.folder} is in use: {who}; wait for its end, stop it, or give another --run")


def _signature() -> bytes:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since}).encode()
