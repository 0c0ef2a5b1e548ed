"""A release has one version, a changelog that agrees, testable bounds, and jobs that exist."""

import re
import tomllib
from datetime import date
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import phi3_lightning

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CHANGELOG = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
WORKFLOWS = sorted((REPOSITORY / ".github/workflows").glob("*.yml"))
PYTHONS = {f"3.{minor}" for minor in range(30) if SpecifierSet(PROJECT["requires-python"]).contains(f"3.{minor}")}


def disagreement(changelog: str, version: str) -> str | None:
    """How a changelog's headings and the version in the code disagree; None if they agree."""
    headings = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    unreleased = headings[:1] == ["Unreleased"]
    released = []
    for heading in headings[unreleased:]:
        match = re.fullmatch(r"(\d+\.\d+\.\d+) - (\d{4}-\d{2}-\d{2})", heading)
        if match is None:
            return f"'{heading}' is no 'X.Y.Z - YYYY-MM-DD'"
        date.fromisoformat(match[2])
        released.append(Version(match[1]))
    if any(newer <= older for newer, older in pairwise(released)):
        return "releases are not in order"
    if unreleased and released and Version(version) <= released[0]:
        return f"{version} is what comes next, and {released[0]} is out already"
    if not unreleased and released[:1] != [Version(version)]:
        return f"{version} is not the newest heading"
    return None


def test_changelog_and_version_agree():
    assert disagreement(CHANGELOG, phi3_lightning.__version__) is None


@pytest.mark.parametrize(
    ("headings", "wrong"),
    [
        (["Unreleased"], False),
        (["Unreleased", "0.0.9 - 2026-01-01"], False),
        (["0.1.0 - 2026-01-01", "0.0.9 - 2025-01-01"], False),
        (["Unreleased", "0.1.0 - 2026-01-01"], True),  # the version was not raised after the release
        (["0.0.9 - 2026-01-01"], True),  # the heading was not renamed
        (["0.1.0 - 2026-01-01", "0.2.0 - 2025-01-01"], True),
        (["0.1.0"], True),
        ([], True),
    ],
)
def test_a_disagreement_would_be_seen(headings, wrong):
    changelog = "".join(f"## {heading}\n\n- something\n" for heading in headings)
    assert (disagreement(changelog, "0.1.0") is not None) == wrong


def test_the_version_is_in_one_place():
    assert PROJECT["dynamic"] == ["version"]
    places = [
        path.name
        for path in (REPOSITORY / "src").rglob("*.py")
        if f'"{phi3_lightning.__version__}"' in path.read_text(encoding="utf-8")
    ]
    assert places == ["__init__.py"]


def test_every_dependency_has_a_lower_bound_that_can_be_tested():
    extras = PROJECT["optional-dependencies"].values()
    named = [Requirement(text) for text in (*PROJECT["dependencies"], *(text for extra in extras for text in extra))]
    assert [str(one) for one in named if not any(bound.operator == ">=" for bound in one.specifier)] == []


def test_every_python_is_classified_and_tested():
    kinds = [kind.rpartition(" ")[2] for kind in PROJECT["classifiers"] if kind.startswith("Programming Language")]
    assert set(kinds) == PYTHONS
    jobs = yaml.safe_load((REPOSITORY / ".github/workflows/scheduled.yml").read_text(encoding="utf-8"))["jobs"]
    assert set(jobs["python"]["strategy"]["matrix"]["python"]) == PYTHONS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_what_is_there(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow[True]  # YAML reads the key `on` so
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    steps = [(job, step) for job in workflow["jobs"].values() for step in job["steps"]]
    for job, step in steps:
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"])  # a tag may be moved
            continue
        command, *words = step["run"].replace("${{ matrix.target }}", "$target").split()
        if command == "make":
            variables = {word for word in words if "=" in word}
            rows = job.get("strategy", {}).get("matrix", {}).get("include", [])
            assert {row["target"] for row in rows} if words == ["$target"] else set(words) - variables <= targets
            assert all(row["target"] in targets for row in rows)
        elif words[:2] != ["-m", "pip"]:
            called = [word for word in (command, *words) if word.startswith((".ci/", "scripts/", "tests/"))]
            assert called
            assert all((REPOSITORY / word).exists() for word in called)


def test_there_are_workflows():
    assert {path.stem for path in WORKFLOWS} == {"ci", "scheduled"}
