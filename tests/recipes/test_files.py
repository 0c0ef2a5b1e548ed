"""Everything that the configurations and the guide name exists, and the commands of the guide run."""

import re
import shlex

import pytest

from cli.conftest import REPOSITORY

CONFIGS = sorted(path for path in (REPOSITORY / "configs").rglob("*") if path.suffix in (".yaml", ".sbatch"))
GUIDE = (REPOSITORY / "docs/recipes.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [*CONFIGS, REPOSITORY / "docs/recipes.md"], ids=lambda path: path.stem)
def test_files_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/])((?:configs|scripts|benchmarks|docs|examples|src)/[\w/]+\.\w+)", text))
    missing = {name for name in named if not (REPOSITORY / name).exists()}
    assert missing <= {"configs/NAME.yaml"}
    linked = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert [link for link in linked if not (path.parent / link).exists()] == []


def test_every_configuration_says_how_to_run_it():
    for path in CONFIGS:
        assert re.search(rf"(cli\.py fit|sbatch) .*{path.name}|sbatch configs/overlays", path.read_text()), path


def test_every_configuration_is_in_the_guide_or_the_readme():
    known = GUIDE + (REPOSITORY / "README.md").read_text() + (REPOSITORY / "docs/multi_node.md").read_text()
    assert [path.name for path in CONFIGS if path.stem not in known] == []


def test_a_recipe_is_tried_by_the_command_of_the_guide(cli, tmp_path):
    [command] = re.findall(r"^python cli\.py (fit .*tiny\.yaml --run trial)$", GUIDE, re.MULTILINE)
    cli(*shlex.split(command))
    assert (tmp_path / "runs/trial/checkpoints/best.ckpt").is_file()
