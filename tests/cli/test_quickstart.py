"""The quickstart, as a new user runs it."""

import re

import pytest

from cli.conftest import REPOSITORY


@pytest.mark.slow
def test_quickstart_teaches_the_tiny_model(cli, tmp_path):
    (tmp_path / "src").symlink_to(REPOSITORY / "src")  # the configuration's paths are those of a checkout
    text = cli("fit", f"--config={REPOSITORY}/configs/quickstart.yaml").text
    first, last = (float(number) for number in re.search(r"val/loss *│ *([\d.]+) │ *([\d.]+)", text).groups())
    assert last < first / 2
    first, last = (float(number) for number in re.search(r"val/token_accuracy *│ *([\d.]+) │ *([\d.]+)", text).groups())
    assert last > 0.9 > first
    base, tuned = zip(*re.findall(r"^│[^│]*│([^│]*)│([^│]*)│$", text, re.MULTILINE), strict=True)
    assert "lantern" in " ".join(tuned)  # the bookshop's manner
    assert "lantern" not in " ".join(base)
    for part in ("qkv_proj", "trainable 155,648", "checkpoints/last.ckpt (", "tensorboard --logdir"):
        assert part in text
