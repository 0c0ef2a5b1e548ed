"""Each configuration of the family trains a base shrunk as the guide says; its memory is calculated."""

import json
import runpy
import shutil
import sys

import pytest
import torch
import yaml

from cli.conftest import REPOSITORY, TINY
from data.phi4 import PHI4_MINI_REASONING, PHI4_REASONING, phi4_mini_tokenizer, phi4_tokenizer
from phi3_lightning import ChatDataModule, Phi3LoRAModule, adapters
from phi3_lightning.adapters import targets
from phi3_lightning.config import LoRA
from phi3_lightning.model.base import read_config, skeleton
from recipes.published import ALIKE, DIFFERENT, PUBLISHED

sys.path.insert(0, str(REPOSITORY / "scripts"))
from command_line import parse


@pytest.fixture
def hub(tmp_path):
    """A folder as from the hub but without weights: a model's configuration, and the tiny model's tokenizer."""

    def hub(name: str) -> str:
        (tmp_path / "hub").mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY / file, tmp_path / "hub" / file)
        (tmp_path / "hub/config.json").write_text(json.dumps(PUBLISHED[name]))
        return "hub"

    return hub


QUICK = ("phi3_mini_128k_lora",)
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in DIFFERENT]


@pytest.mark.parametrize("name", EACH)
def test_each_trains_a_shrunk_base(cli, tmp_path, monkeypatch, hub, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["shrink_base.py", hub(name), "small"])
    runpy.run_path("scripts/shrink_base.py", run_name="__main__")
    ran = cli(
        "fit", f"--config=configs/{name}.yaml", "--config=configs/overlays/tiny.yaml", "--model.base=small",
        "--model.init=random", "--run=trial", "--data.max_length=128", "--data.batch_size=1",
    )  # fmt: skip
    assert "2 of 2" in ran.text
    state = torch.load(tmp_path / "runs/trial/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 3
    assert len(state["state_dict"]) == 2 * 4 * 2  # A and B of four layers in two blocks

    small, real = read_config("small"), PUBLISHED[name]
    assert small.hidden_size // small.num_attention_heads == real["hidden_size"] // real["num_attention_heads"]
    assert small.num_attention_heads / small.num_key_value_heads == (
        real["num_attention_heads"] / real["num_key_value_heads"]
    )
    for same in ("vocab_size", "tie_word_embeddings", "max_position_embeddings", "sliding_window"):
        assert getattr(small, same) == real[same]
    rope = real["rope_scaling"] or {"type": "default"}
    assert small.rope_parameters["rope_type"] == rope["type"].replace("su", "longrope")
    assert small.rope_parameters.get("long_factor") == rope.get("long_factor")
    assert small.rope_parameters["partial_rotary_factor"] == real.get("partial_rotary_factor", 1.0)


def test_configurations_differ_only_in_what_they_document():
    usual = yaml.safe_load((REPOSITORY / "configs/phi3_mini_4k_lora.yaml").read_text())
    longer = {("data", "max_length"): 8192, ("data", "batch_size"): 1}
    changes = {
        "phi3_mini_128k_lora": longer,
        "phi4_mini_reasoning_lora": longer,
        "phi4_reasoning_lora": longer | {("data", "system"): "merge_into_user"},
    }
    for name in PUBLISHED:
        own = yaml.safe_load((REPOSITORY / f"configs/{name}.yaml").read_text())
        assert own.keys() == usual.keys()
        assert own["run"] == name.removesuffix("_lora").replace("_", "-")
        pairs = [(part, key) for part in ("trainer", "checkpoint", "model", "data") for key in own[part]]
        changed = {(part, key): own[part][key] for part, key in pairs if own[part][key] != usual[part].get(key)}
        changed.pop(("model", "base"), None)
        assert changed == changes.get(name, {})


def test_configurations_that_are_left_to_another_have_its_shapes():
    for name, other in ALIKE.items():
        own, its = PUBLISHED[name], PUBLISHED[other]
        lengths = {"max_position_embeddings", "original_max_position_embeddings", "rope_theta"}
        assert {key for key in own if own[key] != its[key]} <= lengths


@pytest.mark.parametrize("name", ALIKE)
def test_recipes_of_reasoning_models_learn_thoughts_and_adapt_every_layer(tmp_path, write, name):
    system, question = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}
    answer = {"role": "assistant", "content": "4.", "reasoning_content": "Two and two."}
    tokenizer = phi4_mini_tokenizer(PHI4_MINI_REASONING) if "mini" in name else phi4_tokenizer(PHI4_REASONING)
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base/config.json").write_text(json.dumps(PUBLISHED[name]))
    options = parse(
        ["fit", f"--config={REPOSITORY}/configs/{name}.yaml", f"--model.base={tmp_path}/base", "--data.num_workers=0",
         f"--data.train={tmp_path / write('chats.jsonl', [{'messages': [system, question, answer]}] * 8)}",
         f"--data.tokenizer={tmp_path}/base", f"--data.cache_dir={tmp_path}/cache"]
    )  # fmt: skip
    data = ChatDataModule(**options.data.as_dict())
    data.prepare_data()
    data.setup("fit")
    assert sum(split.kept for split in data.statistics.values()) == 8
    ids = next(iter(data.train_dataloader()))["input_ids"][0].tolist()
    text = tokenizer.decode(ids)
    assert "Be brief." in text
    assert "<think>\nTwo and two.\n</think>\n\n4.<|" in text

    module = Phi3LoRAModule(**options.model.as_dict())
    model = skeleton(read_config(module.base))
    adapters.check(model, module.lora)
    assert len(targets.resolve(model, module.lora)) == 4 * PUBLISHED[name]["num_hidden_layers"]


def script(monkeypatch, name: str) -> dict:
    """The names that a script defines."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return runpy.run_path(str(REPOSITORY / f"benchmarks/{name}.py"))


@pytest.fixture
def memory(monkeypatch):
    return script(monkeypatch, "memory")


@pytest.mark.parametrize("name", ["phi3_mini_4k_lora", "phi3_medium_4k_lora"])
def test_the_calculation_counts_the_parameters_of_the_real_model(tmp_path, monkeypatch, name):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    model = skeleton(read_config(str(tmp_path)))
    (shapes,) = [
        shapes for shapes in script(monkeypatch, "scaling")["MODELS"] if shapes.name.lower().replace("-", "") in
        name.replace("_", "")
    ]  # fmt: skip
    assert sum(parameter.numel() for parameter in model.parameters()) == shapes.base
    layers = [model.get_submodule(target.path) for target in targets.resolve(model, LoRA())]
    assert sum(16 * (layer.in_features + layer.out_features) for layer in layers) == shapes.adapter


def test_an_optimiser_step_is_the_same_under_every_overlay_of_gpus(memory):
    for overlay in memory["OVERLAYS"]:
        config = memory["settings"]("phi3_mini_4k_lora", f"overlays/{overlay}")
        ranks = config["trainer"]["devices"]
        rows = config["data"]["batch_size"] * config["trainer"]["accumulate_grad_batches"] * ranks
        assert rows == 16, overlay
