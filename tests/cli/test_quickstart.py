"""The quickstart, as a new user runs it."""

import re

import pytest

from cli.conftest import REPOSITORY


def first_and_last(metric: str, text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in re.search(rf"{metric} *│ *([\d.]+) │ *([\d.]+)", text).groups())


@pytest.mark.slow
def test_quickstart_teaches_the_tiny_model_and_then_a_preference(cli, tmp_path):
    (tmp_path / "src").symlink_to(REPOSITORY / "src")  # the configuration's paths are those of a checkout
    text = cli("fit", f"--config={REPOSITORY}/configs/quickstart.yaml").text
    first, loss_of_chats = first_and_last("val/loss", text)
    assert loss_of_chats < first / 2
    first, last = first_and_last("val/token_accuracy", text)
    assert last > 0.9 > first
    base, tuned = zip(*re.findall(r"^│[^│]*│([^│]*)│([^│]*)│$", text, re.MULTILINE), strict=True)
    assert "lantern" in " ".join(tuned)  # the bookshop's manner
    assert "lantern" not in " ".join(base)
    for part in ("qkv_proj", "trainable 155,648", "checkpoints/last.ckpt (", "tensorboard --logdir"):
        assert part in text

    text = cli("fit", f"--config={REPOSITORY}/configs/quickstart_dpo.yaml").text
    first, last = first_and_last("val/ranking_accuracy", text)
    assert last >= 0.9 > 0.6 >= first
    checkpoint = "--ckpt_path=runs/quickstart-dpo/checkpoints/last.ckpt"
    text = cli("validate", f"--config={REPOSITORY}/configs/quickstart.yaml", checkpoint).text
    assert float(re.search(r"val/loss *│ *([\d.]+)", text)[1]) <= 1.1 * loss_of_chats
