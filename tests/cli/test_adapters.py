"""The backends' configurations as commands; wrong adapters are named before the model is loaded."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from cli.conftest import QUICK, REPOSITORY, TINY

CONFIGS = ["phi3_mini_4k_loralib", "phi3_mini_4k_dora", "phi3_mini_4k_qlora"]


@pytest.mark.parametrize("name", CONFIGS)
def test_each_configuration_trains_three_steps(cli, tmp_path, name):
    if name.endswith("qlora") and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("the extra qlora is not installed")
    config = f"--config={REPOSITORY}/configs/{name}.yaml"
    ran = cli("fit", config, *QUICK, "--trainer.limit_val_batches=1", "--trainer.max_steps=3")
    state = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)
    assert state["global_step"] == 3
    assert all("lora_" in key for key in state["state_dict"])
    slices = re.findall(r"│ (\w+) of (?:qkv|gate_up)_proj", ran.text)
    assert slices == (["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"] if name.endswith("loralib") else [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.lora.target_modules=[q_proj]"], "set model.lora.backend: loralib, or name qkv_proj"),
        (["--model.lora.init_lora_weights=pissa"], "it rewrites the base weights"),
        (["--model.lora.enable_lora={qkv_proj: [true]}"], "give 3 values, for q_proj, k_proj, v_proj"),
        (["--model.lora.target_modules=[qkv_proj, q_proj]"], "q_proj is a slice of qkv_proj"),
        (["--model.lora.backend=loralib", "--model.lora.use_dora=true"], "model.lora.backend: peft"),
        (["--model.lora.modules_to_save=[qkv_proj]"], "qkv_proj carries an adapter"),
        (["--model.lora.lora_alpha=0"], "model.lora.lora_alpha"),
        (["--model.lora.init_from=nowhere.ckpt"], "model.lora.init_from: nowhere.ckpt: there is no such checkpoint"),
        (["--model.lora.bias=all"], "no layer of a Phi3ForCausalLM has a bias"),
    ],
)
def test_bad_input_is_one_clear_error(cli, options, message):
    refused = cli("fit", *QUICK, "--trainer.max_steps=1", *options, code=None)
    assert refused.status != 0
    assert message in refused.text
    assert "Traceback" not in refused.text


def test_a_run_goes_on_without_the_file_that_it_started_from(cli, tmp_path):
    source = tmp_path / "start.ckpt"
    cli("fit", *QUICK, "--trainer.max_steps=1", "--run=first")
    next((tmp_path / "runs/first").rglob("last.ckpt")).rename(source)
    options = (*QUICK, f"--model.lora.init_from={source}", "--run=second")
    assert f"adapter: starting from {source}" in cli("fit", *options, "--trainer.max_steps=1").text
    source.unlink()
    assert "resuming after step 1" in cli("fit", *options, "--trainer.max_steps=2").text
    refused = cli("fit", *options, "--trainer.max_steps=1", "--run=third", code=1)
    assert f"error: model.lora.init_from: {source}: there is no such checkpoint" in refused.text


def adapter_folder(folder: Path, **keys) -> Path:
    """Write a PEFT adapter folder with changed keys in its configuration."""
    LoraConfig(r=4, target_modules=["o_proj"], base_model_name_or_path=str(TINY)).save_pretrained(str(folder))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return folder


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changes the base weights"),
        (
            {"alora_invocation_tokens": [5]},
            "alora_invocation_tokens: [5] cannot be used: the adapter acts on",
        ),
        ({"peft_type": "IA3"}, "peft_type: 'IA3' is not read"),
        ({"a_key_of_tomorrow": 2}, "a_key_of_tomorrow: 2 is not known here"),
        ({"r": "4"}, "r: '4' cannot be used: give a whole number"),
    ],
)
def test_an_adapter_of_another_kind_is_named_before_the_base_is_loaded(cli, tmp_path, keys, message):
    folder = adapter_folder(tmp_path / "adapter", **keys)
    prefix = f"{folder}: adapter_config.json: {message}"
    absent = f"--model.base={tmp_path}/absent"  # loading it would be another error
    for option, args in (
        ("--ckpt_path", ("chat", f"--ckpt_path={folder}", absent, "--prompt=Hello")),
        ("model.lora.init_from", ("fit", *QUICK, f"--model.lora.init_from={folder}", "--trainer.max_steps=1")),
    ):
        refused = cli(*args, code=1)
        assert re.findall(r"^error: .*", refused.text, re.MULTILINE) == [
            line for line in refused.text.splitlines() if line.startswith(f"error: {option}: {prefix}")
        ]
        assert f"error: {option}: {prefix}" in refused.text
        assert "Traceback" not in refused.text
    assert not (tmp_path / "runs").exists()


def test_slices_are_chosen_by_enable_lora_in_a_file(cli, tmp_path):
    (tmp_path / "a.yaml").write_text(
        f"model: {{base: {TINY}, lora: {{backend: loralib, target_modules: [qkv_proj],"
        " enable_lora: {qkv_proj: [true, false, true]}, alpha_pattern: {qkv_proj: 8}}}\n"
    )
    ran = cli("fit", "--config=a.yaml", *QUICK, "--trainer.max_steps=1")
    assert "q_proj of qkv_proj" in ran.text
    assert "v_proj of qkv_proj" in ran.text
    assert "k_proj of qkv_proj" not in ran.text
