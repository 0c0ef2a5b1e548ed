"""The recipes of the Phi-3 cookbook, each on a small file in the format of the original's data set."""

import importlib.util
import json
import re

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from cli.conftest import REPOSITORY, TINY
from phi3_lightning.config.lora import PHI3_LINEAR_LAYERS

TINY_OVERLAY = "--config=configs/overlays/tiny.yaml"

SHAREGPT = [
    {
        "conversations": [
            *([{"from": "system", "value": "You are kind."}] if number % 2 else []),
            {"from": "human", "value": f"How are you on day {number}?"},
            {"from": "gpt", "value": f"On day {number} I am well. And you?"},
            {"from": "human", "value": "Well too."},
            {"from": "gpt", "value": "That is good to hear."},
        ]
    }
    for number in range(40)
]
ALPACA = [
    {
        "instruction": f"Write a function that adds {number} to a number.",
        "input": "" if number % 3 else "3",
        "output": f"def add(x):\n    return x + {number}",
        "prompt": "Below is an instruction that describes a task. Write a response that completes the request.",
    }
    for number in range(120)
]
ULTRACHAT = [
    {
        "prompt": f"Tell me about number {number}.",
        "prompt_id": f"{number:064x}",
        "messages": [
            {"content": f"Tell me about number {number}.", "role": "user"},
            {"content": f"It comes after {number - 1}.", "role": "assistant"},
        ],
    }
    for number in range(60)
]
ROWS = {
    "cookbook_inference_finetuning": SHAREGPT,
    "cookbook_fine_training_script": SHAREGPT,
    "cookbook_finetune_lora_python": ALPACA,
    "cookbook_finetune_qlora_python": ALPACA,
    "cookbook_sample_finetune": ULTRACHAT,
}


def settings(name: str) -> dict:
    return yaml.safe_load((REPOSITORY / f"configs/{name}.yaml").read_text(encoding="utf-8"))


def options_of(name: str, data: str) -> tuple[str, ...]:
    """The recipe on the tiny model and on a file."""
    return (f"--config=configs/{name}.yaml", TINY_OVERLAY, f"--data.train={data}")


def needs_its_extra(name: str) -> None:
    if settings(name)["model"].get("quantization") and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("the extra qlora is not installed")


@pytest.mark.parametrize("name", ROWS)
def test_each_recipe_trains_on_the_originals_format(cli, tmp_path, write, name):
    needs_its_extra(name)
    ran = cli("fit", *options_of(name, write("rows.jsonl", ROWS[name])), "--data.val=null", "--data.val_fraction=0.1")
    run = tmp_path / "runs" / settings(name)["run"]
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 3
    assert all("lora_" in key for key in state["state_dict"])
    # the cookbook's lists of targets reach two of these four
    assert set(re.findall(r"│ (\w+_proj) *│ *4 of 4 │ +16 │", ran.text)) == set(PHI3_LINEAR_LAYERS)
    kept = state["hyper_parameters"] | {"batch_size": state["datamodule_hyper_parameters"]["batch_size"]}
    recipe = settings(name)
    assert kept["optimizer"]["lr"] == recipe["model"]["optimizer"]["lr"]
    assert kept["lora"]["lora_alpha"] == recipe["model"]["lora"]["lora_alpha"]
    assert recipe["model"]["schedule"].items() <= kept["schedule"].items()
    assert kept["batch_size"] == recipe["data"]["batch_size"]


def test_the_sharegpt_recipe_predicts_before_and_after_training(cli, tmp_path, write):
    name = "cookbook_inference_finetuning"
    prompts = write("prompts.jsonl", [{"prompt": "Write a C# code that reads files."}, {"prompt": "How are you?"}])
    recipe = (*options_of(name, write("rows.jsonl", SHAREGPT)), "--data.val=null", f"--data.predict={prompts}")
    answers = tmp_path / "runs/cookbook-inference-finetuning/predictions.jsonl"

    before = cli("predict", *recipe)
    assert "no checkpoint, the base model answers" in before.text
    places = [line["place"] for line in map(json.loads, answers.read_text().splitlines())]
    assert places == [f"{prompts}:1", f"{prompts}:2"]
    fitted = cli("fit", *recipe)
    header, first = re.search(r"┃( prompt .*)┃\n┡.*\n│(.*)│\n", fitted.text).groups()
    assert [column.strip() for column in header.split("┃")] == ["prompt", "base", "tuned"]
    assert len(first.split("│")) == 3
    after = cli("predict", *recipe)
    assert "checkpoints/best.ckpt: taken" in after.text
    assert len(answers.read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["cookbook_finetune_lora_python", "cookbook_finetune_qlora_python"])
def test_alpaca_is_trained_tested_and_merged(cli, tmp_path, write, name):
    needs_its_extra(name)
    recipe = options_of(name, write("train.jsonl", ALPACA[:-20]))
    test = write("test.jsonl", ALPACA[-20:])
    recipe = (*recipe, "--data.val=null", f"--data.test={test}", "--model.base_id=tiny/phi3")
    cli("fit", *recipe)
    cli("test", *recipe)
    report = (tmp_path / "runs" / settings(name)["run"] / "test.md").read_text()
    assert "20 with token losses, 20 answered" in report
    assert re.search(r"\| ROUGE-Lsum \| [\d.]+ ", report)
    cli("export", f"--run={settings(name)['run']}", "--output_dir=python-coder", "--merge")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "python-coder")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    base = AutoModelForCausalLM.from_pretrained(TINY)  # unquantised, also where training used 4 bits
    assert merged.config.to_dict().get("quantization_config") is None
    changed = [name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, base.state_dict()[name])]
    assert {name.split(".")[-2] for name in changed} == set(PHI3_LINEAR_LAYERS)


def test_rows_that_are_tested_are_not_trained():
    for name in ("cookbook_finetune_lora_python", "cookbook_finetune_qlora_python"):
        data = settings(name)["data"]
        assert data["train"].endswith("train[:-500]")
        assert data["test"].endswith("train[-500:]")
