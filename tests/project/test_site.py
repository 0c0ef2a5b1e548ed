"""The site builds without warnings, and a fault in a page is a warning."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli.conftest import REPOSITORY

pytest.importorskip("mkdocs", reason="no mkdocs: the extra docs is not installed")

[OPTIONS] = re.findall(r"/mkdocs (build [^#\n]*)", (REPOSITORY / "Makefile").read_text())


def build(folder: Path, **pages: str) -> subprocess.CompletedProcess[str]:
    """Build the site as ``make docs`` does, with something added to some of its pages."""
    shutil.copytree(REPOSITORY / "docs", folder / "docs")
    for name in ("mkdocs.yml", "scripts", "src"):
        (folder / name).symlink_to(REPOSITORY / name)
    for name, text in pages.items():
        with (folder / f"docs/{name}.md").open("a", encoding="utf-8") as page:
            page.write(text)
    command = [sys.executable, "-m", "mkdocs", *OPTIONS.split(), "--config-file", str(folder / "mkdocs.yml")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_the_site_is_complete_and_loads_nothing_external(tmp_path):
    built = build(tmp_path)
    assert built.returncode == 0, built.stderr
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "site").glob("*.html")}
    assert "Rank of the update" in pages["configuration.html"]
    assert "class='doc" in (api := pages["api.html"].replace('"', "'"))
    assert "ChatDataModule" in api
    fetched = r"<(?:script|img|link)[^>]+(?:src|href)=\"?https?://(?!.*rel=.canonical)"
    assert [name for name, text in pages.items() if re.search(fetched, text)] == []


@pytest.mark.slow
def test_faults_in_a_page_end_the_build(tmp_path):
    faults = "[x](data.md#absent)", "[x](../tests/absent.py)"
    built = build(tmp_path, chat="".join(f"\n{fault}\n" for fault in faults))
    assert built.returncode != 0
    for warning in ("does not contain an anchor '#absent'", "'sources/tests/absent.py.md'"):
        assert warning in built.stderr
    assert "upstream_internals.md" not in built.stderr  # no other page is at fault
