"""The recipes of preference tuning, each on a few rows of its kind and the tiny model."""

import re
import shutil

import pytest
import torch
import yaml

from cli.conftest import REPOSITORY, start

OVERLAY = "--config=configs/overlays/tiny.yaml"
PAIRS = [
    {"prompt": f"How are you on day {number}?", "chosen": f"On day {number} I am well.", "rejected": "Go away."}
    for number in range(24)
]
LABELLED = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair in PAIRS
    for side in ("chosen", "rejected")
]


@pytest.fixture(scope="module")
def supervised(tmp_path_factory):
    """The folder of a run of the recipe whose adapter the others start from."""
    folder = tmp_path_factory.mktemp("supervised")
    for name in ("src", "configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    run = start(folder, "fit", "--config=configs/phi3_mini_4k_lora.yaml", OVERLAY)
    assert run.wait() == 0, run.text
    return folder / "runs/phi3-mini-4k"


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("dpo", PAIRS),
        pytest.param("orpo", PAIRS, marks=pytest.mark.slow),
        pytest.param("kto", LABELLED, marks=pytest.mark.slow),
    ],
)
def test_each_recipe_trains_on_its_kind_of_rows(cli, tmp_path, write, supervised, name, rows):
    shutil.copytree(supervised, tmp_path / "runs/phi3-mini-4k")
    path = f"configs/phi3_mini_4k_{name}.yaml"
    ran = cli("fit", f"--config={path}", OVERLAY, f"--data.train={write('rows.jsonl', rows)}", "--data.val=null")
    recipe = yaml.safe_load((REPOSITORY / path).read_text())
    state = torch.load(tmp_path / "runs" / recipe["run"] / "checkpoints/best.ckpt", weights_only=True)
    assert state["global_step"] == 3
    kept = state["hyper_parameters"]
    assert recipe["model"]["objective"].items() <= kept["objective"].items()
    assert kept["optimizer"]["lr"] == recipe["model"]["optimizer"]["lr"]
    assert ("reference" in state) == (recipe["model"]["lora"]["init_from"] is not None) == (name != "orpo")
    assert re.search(r"val/ranking_accuracy *│ [\d.]+ │ [\d.]+ │", ran.text)


def test_recipes_differ_from_the_supervised_one_only_in_what_they_document():
    read = {
        name: yaml.safe_load((REPOSITORY / f"configs/phi3_mini_4k_{name}.yaml").read_text())
        for name in ("lora", "dpo", "orpo", "kto")
    }
    usual = read.pop("lora")
    own = {
        ("trainer", "num_sanity_val_steps"), ("model", "lora"), ("model", "objective"), ("model", "optimizer"),
        ("model", "schedule"), ("data", "train"), ("data", "batch_size"),
    }  # fmt: skip
    for name, recipe in read.items():
        changed = {
            (section, key)
            for section in ("trainer", "checkpoint", "model", "data")
            for key, value in recipe[section].items()
            if value != usual[section].get(key)
        }
        assert changed <= own
        lora = {"init_from": None, **usual["model"]["lora"]}
        if name != "orpo":
            lora |= {"init_from": f"runs/{usual['run']}/checkpoints/best.ckpt", "lora_dropout": 0.0}
        assert recipe["model"]["lora"] == lora
