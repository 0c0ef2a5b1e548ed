"""A folder like a checkout, in which the commands of the documentation run as written."""

import json
from pathlib import Path

import pytest

from cli.conftest import REPOSITORY
from cli.conftest import cli as cli


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path) -> Path:
    """Link the folders that commands name into the working directory."""
    for name in ("src", "configs", "scripts"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    return tmp_path


@pytest.fixture
def write(tmp_path: Path):
    """Write rows as JSON lines and return the file's name."""

    def write(name: str, rows: list[dict]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return name

    return write
