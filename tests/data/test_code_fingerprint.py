"""The key of a cache follows what code does, and nothing that only people read."""

import ast

import pytest

from phi3_lightning.data import prepare
from phi3_lightning.data.code_fingerprint import package_code, without_docstrings

CODE = '''"""Says something."""

LIMIT = 3
"""What a limit is."""


class Reader:
    """Reads."""

    def read(self, rows, *, skip=False):
        """Read rows."""
        # those that are known
        try:
            return [row for row in rows if row in {"a", "b", "c"}]
        except ValueError:
            return None
'''


def actions(source: str) -> str:
    return ast.dump(without_docstrings(source))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Says something.", "Says something else."),
        ('"""Says something."""\n', ""),
        ('"""What a limit is."""', ""),
        ('    """Reads."""\n', ""),
        ('        """Read rows."""\n', '        """Read rows.\n\n        Returns:\n            Them.\n        """\n'),
        ("        # those that are known\n", ""),
        ("if row in", "\n                if row in"),
    ],
)
def test_what_people_read_changes_nothing(old: str, new: str) -> None:
    assert old in CODE
    assert actions(CODE.replace(old, new)) == actions(CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LIMIT = 3", "LIMIT = 4"),
        ('"c"}', '"d"}'),
        ("row in {", "row not in {"),
        ("ValueError", "KeyError"),
        ("skip=False", "skip=True"),
        ("rows, *, skip", "rows, skip"),
        ("return None", "return 1"),
    ],
)
def test_what_code_does_changes_the_key(old: str, new: str) -> None:
    assert old in CODE
    assert actions(CODE.replace(old, new)) != actions(CODE)


def test_all_that_decides_about_tokens_counts() -> None:
    names = {name.removeprefix("phi3_lightning.") for name in package_code(prepare.__name__)}
    rooms = ("formats", "fields", "messages", "template", "word_cache", "truncation", "readers", "tables", "encode")
    assert {f"data.{room}" for room in rooms} | {"config.data"} <= names
    assert "data.datamodule" not in names
