"""Paths given by the user, and errors of the file system on writing."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from phi3_lightning.errors import ConfigError
from phi3_lightning.files import file_error, local_path, writing


@pytest.mark.parametrize(
    "address",
    ["s3://bucket/x", "gs://bucket/x", "hf://datasets/a/b", "memory://x", "https://host/x.jsonl", "dbfs:/mnt/x",
     "simplecache::s3://bucket/x", "abfss://a@b.dfs.core.windows.net/x", str(Path("s3://bucket/x"))],
)  # fmt: skip
def test_a_url_is_refused_as_a_path(address):
    with pytest.raises(ConfigError, match=r"^checkpoint\.dirpath: .* is an address.*mount it or copy it"):
        local_path("checkpoint.dirpath", address)


@pytest.mark.parametrize("address", ["file:///x/y", "file:/x/y", "file://localhost/x/y"])
def test_a_file_url_is_refused_with_its_path(address):
    with pytest.raises(ConfigError, match=r"is an address.*; give /x/y$"):
        local_path("--ckpt_path", address)


@pytest.mark.parametrize("path", ["a/b", "/a/b", "a:b", "a b", "run=3/x", ".", "last.ckpt", "12:30/x"])
def test_other_names_are_paths(path):
    assert local_path("run", path) == Path(path)


def test_the_home_folder_is_known(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("trainer.default_root_dir", "~/runs") == Path("/home/me/runs")


def error_of(action) -> OSError:
    with pytest.raises(OSError) as caught:  # noqa: PT011, the kinds are the point
        action()
    return caught.value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "file" / "x").mkdir(), "file/x: Not a directory; move what is in the way"),
        (lambda folder: (folder / "file").mkdir(), "file: File exists; move what is in the way"),
        (lambda folder: folder.open("w"), "Is a directory; move what is in the way"),
        (lambda folder: (folder / "none" / "x").write_text(""), "none/x: No such file or directory; make its folder"),
        (lambda folder: (folder / ("x" * 300)).mkdir(), "File name too long; give another name"),
        (lambda folder: (folder / "full").write_text("x"), "the run: No space left on device; free some space there"),
    ],
)
def test_errors_of_the_file_system_name_file_and_remedy(tmp_path, make, message):
    (tmp_path / "file").touch()
    (tmp_path / "full").symlink_to("/dev/full")
    assert message in file_error(error_of(lambda: make(tmp_path)), Path("the run"))


@pytest.mark.parametrize(
    "error",
    [OSError("no number"), ConnectionRefusedError(errno.ECONNREFUSED, "refused"), PermissionError(errno.EPERM, "kill"),
     FileNotFoundError(errno.ENOENT, "no working directory"), TimeoutError()],
)  # fmt: skip
def test_other_errors_are_not_the_file_systems(error):
    assert file_error(error, Path("the run")) is None
    with pytest.raises(type(error)), writing(Path("the run")):
        raise error


def test_programming_errors_are_raised_unchanged():
    with pytest.raises(RuntimeError, match="a bug"), writing(Path("the run")):
        raise RuntimeError("a bug")


def in_a_child(action) -> str:
    """The file system error of ``action`` in a process that may write at most 4 kB per file."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            with writing(Path("the export")):
                action()
        except ConfigError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as reader:
        return reader.read()


def write_by_torch(path: Path) -> None:
    with path.open("wb") as file:
        torch.save({"x": torch.zeros(10_000)}, file)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(10_000)),
        lambda path: save_file({"x": torch.zeros(10_000)}, path),
        lambda path: write_by_torch(path),
    ],
    ids=["python", "safetensors", "torch"],
)
def test_write_errors_of_libraries_are_recognised(tmp_path, write):
    assert in_a_child(lambda: write(tmp_path / "file")) == (
        "the export: File too large; free some space there, or name a place on another disk"
    )
