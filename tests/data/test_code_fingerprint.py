"""The cache key follows what the code does, not docstrings or comments."""

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
def test_docstrings_and_comments_do_not_change_the_key(old: str, new: str) -> None:
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
def test_changes_of_behaviour_change_the_key(old: str, new: str) -> None:
    assert old in CODE
    assert actions(CODE.replace(old, new)) != actions(CODE)


def test_every_module_that_decides_tokens_is_in_the_key() -> None:
    names = {name.removeprefix("phi3_lightning.") for name in package_code(prepare.__name__)}
    rooms = ("formats", "fields", "messages", "template", "word_cache", "truncation", "readers", "tables", "encode")
    assert {f"data.{room}" for room in rooms} | {"config.data"} <= names
    assert "data.datamodule" not in names
