"""Templates escape their values, need every value, and are part of the package."""

import pytest
from jinja2 import UndefinedError

from phi3_lightning.pages import render, statistics
from phi3_lightning.pages.curves import MAX_DOTS, draw

EVIL = "<script>&\"'"


def test_names_of_curves_are_escaped():
    picture = draw({EVIL: [(0, 1.0), (2, 0.5)]})
    assert EVIL not in picture
    assert "&lt;script&gt;&amp;" in picture


def test_a_value_that_is_missing_is_an_error():
    with pytest.raises(UndefinedError):
        render("curves.svg")


def test_a_bar_within_a_cell_of_a_card_is_escaped():
    texts = dict.fromkeys(("front_matter", "name", "kind", "base", "serving", "picture"), "")
    rows = {"statistics": [], "metrics": [], "certificate": [], "settings": [("`target_modules`", "`.*(q|k)_proj`")]}
    card = render("card.md", step=1, whole=False, statistics_columns=(), certificate_positions=1, **texts, **rows)
    assert r"| `target_modules` | `.*(q\|k)_proj` |" in card


def test_points_are_dots_where_they_are_few():
    few, many = ([(step, float(step)) for step in range(count)] for count in (MAX_DOTS, MAX_DOTS + 1))
    assert draw({"val/loss": few}).count("<circle") == MAX_DOTS
    assert draw({"train/loss": many}).count("<circle") == 0
    assert draw({"train/loss": many, "val/loss": few}).count("<polyline") == 2


@pytest.mark.parametrize("curve", [[(0, 2.0)], [(0, 2.0), (4, 2.0)]])
def test_single_points_and_flat_curves_are_drawn(curve):
    picture = draw({"val/loss": curve})
    assert "nan" not in picture
    assert picture.count("<circle") == len(curve)


def test_rows_of_statistics_name_the_reasons():
    counts = {"read": 5, "kept": 3, "cut": 1, "dropped": {"too long": 2}, "tokens": 40, "supervised_tokens": 9}
    assert statistics.rows({"train": counts, "val": counts | {"dropped": {}}}) == [
        ("train", 5, 3, 1, "2 (too long)", 40, 9),
        ("val", 5, 3, 1, "0", 40, 9),
    ]
    assert len(statistics.COLUMNS) == 7
