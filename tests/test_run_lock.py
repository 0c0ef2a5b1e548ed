"""One process at a time may write to a folder, however it ends."""

import errno
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from phi3_lightning import run_lock
from phi3_lightning.errors import ConfigError
from phi3_lightning.run_lock import RunLock


@pytest.fixture(params=["locks", "no locks"])
def file_system(request, monkeypatch) -> str:
    """A file system with locks, or without them, like some network drives."""
    if request.param == "no locks":

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, "no locks available")

        monkeypatch.setattr(fcntl, "lockf", refuse)
    return request.param


class Holder:
    """Another process that holds the lock of a folder."""

    def __init__(self, folder: Path, then: Callable[[RunLock], None] = lambda lock: None) -> None:
        ready, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                lock = RunLock(folder)
                lock.acquire()
                then(lock)
                os.write(write_end, b"x")
                time.sleep(120)
            finally:
                os._exit(1)
        os.close(write_end)
        assert os.read(ready, 1) == b"x"
        os.close(ready)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def hold():
    holders: list[Holder] = []

    def start(*args) -> Holder:
        holders.append(Holder(*args))
        return holders[-1]

    yield start
    for holder in holders:
        try:
            holder.end()
        except ProcessLookupError:
            pass
        except ChildProcessError:
            pass


def test_a_second_writer_is_refused_and_names_the_first(tmp_path, file_system, hold):
    holder = hold(tmp_path / "runs" / "bot")
    with pytest.raises(ConfigError, match=rf"bot is in use: process {holder.pid} on \S+ .* since 20\d\d-.*--run"):
        RunLock(tmp_path / "runs" / "bot").acquire()
    assert [path.name for path in (tmp_path / "runs" / "bot").iterdir()] == [".lock"]


def test_the_lock_of_a_killed_process_is_free(tmp_path, hold):
    hold(tmp_path).end()
    assert (tmp_path / ".lock").exists()
    lock = RunLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    lock.release()


def test_a_forked_process_neither_holds_nor_releases_the_lock(tmp_path, file_system, hold):
    def fork(lock: RunLock) -> None:
        pid = os.fork()
        if pid == 0:
            lock.release()
            os._exit(0)
        os.waitpid(pid, 0)
        if os.fork() == 0:
            os.close(1)
            time.sleep(5)  # outlives the holder
            os._exit(0)

    holder = hold(tmp_path, fork)
    with pytest.raises(ConfigError, match="in use"):
        RunLock(tmp_path).acquire()
    holder.end()
    if file_system == "locks":
        RunLock(tmp_path).acquire()


def test_without_locks_a_silent_process_counts_as_dead(tmp_path, monkeypatch, hold):
    monkeypatch.setattr(fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "none")))
    hold(tmp_path).end()
    with pytest.raises(ConfigError, match="in use"):
        RunLock(tmp_path).acquire()
    long_ago = (tmp_path / ".lock").stat().st_mtime - run_lock.PATIENCE_SECONDS
    os.utime(tmp_path / ".lock", (long_ago, long_ago))
    lock = RunLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    lock.release()


def test_without_locks_a_living_process_keeps_its_file_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.EOPNOTSUPP, "none")))
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.01)
    lock = RunLock(tmp_path)
    lock.acquire()
    os.utime(tmp_path / ".lock", (0, 0))
    while (tmp_path / ".lock").stat().st_mtime == 0:
        time.sleep(0.01)
    lock.release()


def test_a_released_lock_can_be_taken_again(tmp_path, file_system):
    folder = tmp_path / "runs" / "bot"
    for _ in range(2):
        lock = RunLock(folder)
        assert not lock.held
        lock.acquire()
        assert lock.held
        lock.release()
        assert not lock.held
    assert list(tmp_path.iterdir()) == []  # the lock created the folders, and they are empty


def test_a_folder_with_other_files_is_not_removed(tmp_path):
    lock = RunLock(tmp_path / "runs" / "bot")
    lock.acquire()
    (tmp_path / "runs" / "bot" / "config.yaml").touch()
    lock.release()
    assert [path.name for path in (tmp_path / "runs" / "bot").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("place", ["file/run", "file", "full/run"])
def test_a_folder_that_cannot_be_created_is_a_file_system_error(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"[Nn]ot a directory|exists"):
        RunLock(tmp_path / place).acquire()
