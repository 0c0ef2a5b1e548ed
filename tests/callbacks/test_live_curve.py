"""The curve in a notebook: one picture that is replaced, with each step's loss once."""

import re
import sys
from types import ModuleType

import pytest

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.callbacks import LiveCurve
from phi3_lightning.errors import ConfigError

DATA = [synthetic.batch_of([[synthetic.document(8, 4, seed)]]) for seed in range(4)]


@pytest.fixture
def cells(monkeypatch) -> list[list[str]]:
    """The successive contents of each output that is displayed, as IPython would show them."""
    shown: list[list[str]] = []

    class Handle:
        def __init__(self, content):
            self.contents = [content]
            shown.append(self.contents)

        def update(self, content):
            self.contents.append(content)

    module = ModuleType("IPython.display")
    module.HTML = str
    module.display = lambda content, display_id: Handle(content)
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def fit(folder, base, callback: LiveCurve, **options) -> None:
    trainer = synthetic.trainer(folder, callbacks=[callback], **options)
    trainer.fit(Phi3LoRAModule(base, dtype="float32"), synthetic.loader(DATA), synthetic.loader(DATA[:1]))


def test_one_output_shows_each_step_once_and_the_last_picture_all(tmp_path, tiny_base, cells):
    curve = LiveCurve(every_n_steps=2)
    fit(tmp_path, tiny_base, curve, max_epochs=2, accumulate_grad_batches=2)
    assert [step for step, _ in curve.series["train/loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in curve.series["val/loss"]][-2:] == [2, 4]
    [contents] = cells
    assert len(contents) > 2
    last = contents[-1]
    assert last.count("<svg") == 1
    assert set(re.findall(r">(\w+/loss)<", last)) == {"train/loss", "val/loss"}


def test_a_second_fit_has_an_output_of_its_own(tmp_path, tiny_base, cells):
    curve = LiveCurve()
    for _ in range(2):
        fit(tmp_path, tiny_base, curve, max_steps=1)
    assert len(cells) == 2
    assert [step for step, _ in curve.series["train/loss"]] == [1]


def test_without_ipython_it_says_what_to_install(tmp_path, tiny_base, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", None)
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(ConfigError, match="extra notebook"):
        fit(tmp_path, tiny_base, LiveCurve(), max_steps=1)
