"""The adapter in other libraries' formats: names, ranks, and what a format cannot hold."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Phi3ForCausalLM

import synthetic
from export.conftest import FOUR, peft_model
from phi3_lightning.adapters import attach
from phi3_lightning.config import LoRA
from phi3_lightning.errors import ConfigError
from phi3_lightning.export.adapter_files import serving_hint, write_loralib, write_peft


def tiny() -> Phi3ForCausalLM:
    torch.manual_seed(0)
    return Phi3ForCausalLM(synthetic.tiny_config())


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (FOUR, sorted(FOUR)),
        (["qkv_proj"], ["qkv_proj"]),
        ([f"model.layers.{n}.mlp.down_proj" for n in (0, 1)], ["down_proj"]),  # all layers of that name
        (["model.layers.1.mlp.down_proj"], ["model.layers.1.mlp.down_proj"]),
        (r"model\.layers\.0\..*o_proj", ["model.layers.0.self_attn.o_proj"]),
    ],
)
def test_target_names_are_shortened_where_unambiguous(tmp_path, targets, expected):
    adapter = attach(tiny(), LoRA(r=4, target_modules=targets))
    write_peft(adapter.to_peft(), "owner/name", None, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == expected


def test_the_folder_names_the_base_and_holds_the_adapter_alone(tmp_path):
    _, form = peft_model(tiny(), use_rslora=True)
    write_peft(form, "owner/name", "v1", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "v1")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, True)
    assert (config["inference_mode"], config["task_type"]) == (True, "CAUSAL_LM")
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert all("lora_" in name for name in found)
    assert all(torch.equal(found[name], form.tensors[name]) for name in form.tensors)
    assert form.config.base_model_name_or_path != "owner/name"  # the live adapter's config is unchanged


@pytest.mark.parametrize(
    ("options", "allowed"),
    [({"r": 1}, 8), ({"r": 8}, 8), ({"r": 9}, 16), ({"r": 65}, 128), ({"rank_pattern": {"o_proj": 30}}, 32)],
)
def test_the_vllm_command_has_the_next_supported_rank(options, allowed):
    _, form = peft_model(tiny(), **options)
    expected = f"vllm serve owner/name --enable-lora --lora-modules bot=bot --max-lora-rank {allowed}"
    assert serving_hint(form, "owner/name", "bot") == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [({"use_dora": True}, "DoRA"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"r": 600}, "rank 600")],
)
def test_adapters_that_vllm_rejects_are_named(options, message):
    _, form = peft_model(tiny(), **options)
    hint = serving_hint(form, "owner/name", "bot")
    assert f"no adapter with {message}" in hint
    assert "--format merged" in hint


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}],
)
def test_what_loralib_cannot_hold_is_refused(tmp_path, options):
    adapter = attach(tiny(), LoRA(r=4, **options))
    with pytest.raises(ConfigError, match=r"--format loralib: .*export it as peft or merged"):
        write_loralib(adapter.to_peft(), adapter.targets, tmp_path)
