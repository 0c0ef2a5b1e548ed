"""Everything that the README and the guides name exists: files, headings, tests, public names."""

import importlib
import re
import sys
from pathlib import Path

import pytest

import phi3_lightning
from cli.conftest import REPOSITORY
from docs.blocks import PAGES, broken, without_code

PACKAGE = Path(phi3_lightning.__file__).parent
TEST = re.compile(r"\[(test_\w+)\]\((?:\.\./)?(tests/[\w/]+\.py)\)")


def page(name: str) -> str:
    return (REPOSITORY / "docs" / name).read_text(encoding="utf-8")


# ---------------------------------------------------------------------- links


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    assert broken(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize("link", ["absent.md", "data.md#absent", "#absent", "../tests/absent.py"])
def test_a_broken_link_is_found(link):
    assert broken(f"# Here\n\n[there]({link})\n", REPOSITORY / "docs/x.md") == [link]


def test_a_link_to_a_heading_is_followed():
    assert broken("[options](checkpoints.md#what-a-checkpoint-holds)", REPOSITORY / "docs/x.md") == []


# ---------------------------------------------------------------------- tests


def absent_tests(text: str) -> list[str]:
    """The tests that a page links to by name and that their file does not have."""
    return [
        f"{file}::{name}"
        for name, file in TEST.findall(text)
        if f"def {name}(" not in (REPOSITORY / file).read_text(encoding="utf-8")
    ]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_tests_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    assert absent_tests(text) == []
    assert len(TEST.findall(text)) == len(re.findall(r"\[test_\w+\]", without_code(text)))


def test_a_test_that_is_absent_is_found():
    text = "[test_that_never_was](../tests/test_module.py)"
    assert absent_tests(text) == ["tests/test_module.py::test_that_never_was"]


def test_each_fault_has_a_test():
    rows = [row for row in re.findall(r"^\| (.+) \|$", page("faults.md"), re.MULTILINE) if "---" not in row][1:]
    assert len(rows) > 40
    assert [row for row in rows if not TEST.search(row)] == []


# ---------------------------------------------------------------------- the reference


def documented() -> set[str]:
    return set(re.findall(r"^::: (\S+)$", page("api.md"), re.MULTILINE))


def import_object(path: str) -> object:
    """Import an object by its full path."""
    parts = path.split(".")
    for depth in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError:
            continue
        for name in parts[depth:]:
            value = getattr(value, name)
        return value
    raise ModuleNotFoundError(path)


@pytest.mark.parametrize("room", ["phi3_lightning", "phi3_lightning.callbacks", "phi3_lightning.metrics"])
def test_every_public_name_is_in_the_reference(room):
    public = {f"{room}.{name}" for name in importlib.import_module(room).__all__ if name != "__version__"}
    assert public <= documented()


def test_every_name_of_the_reference_exists():
    assert all(import_object(path) is not None for path in documented())
    for path, members in re.findall(
        r"^::: (\S+)\n    options:\n      members:\n((?:        - \w+\n)+)", page("api.md"), re.M
    ):
        assert [name for name in re.findall(r"- (\w+)", members) if not hasattr(import_object(path), name)] == []


def test_the_reference_has_every_option():
    pytest.importorskip("mkdocs", reason="no mkdocs: the extra docs is not installed")
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    from command_line import parse
    from site_pages import configuration

    text = configuration()
    given = ["--model.base=b", "--data.train=c"]
    options = {key for key in parse(["fit", *given]).keys() if not key.startswith("config")}  # noqa: SIM118
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    listed = {
        name if section == "The run" else f"{section}.{name}"
        for section, table in sections.items()
        for name in re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    }
    assert options <= listed, options - listed
    assert "| `r` | `int` | `16` | Rank of the update" in sections["model.lora"]
    assert "&lt;" not in text  # links as Sphinx has them
