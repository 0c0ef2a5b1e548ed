"""Fixtures that every part of the suite shares."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real tokenizer and chat files, which are not part of the repository."""
    folder = Path(os.environ.get("PHI3_LIGHTNING_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is missing (set PHI3_LIGHTNING_SHARED)")
    return folder
