"""The configurations of the backends, as commands; wrong adapters are named before the model is loaded."""

import importlib.util
import re

import pytest
import torch

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
    ("options", "told"),
    [
        (["--model.lora.target_modules=[q_proj]"], "set model.lora.backend: loralib, or name qkv_proj"),
        (["--model.lora.init_lora_weights=pissa"], "it rewrites the base weights"),
        (["--model.lora.enable_lora={qkv_proj: [true]}"], "give 3 values, for q_proj, k_proj, v_proj"),
        (["--model.lora.target_modules=[qkv_proj, q_proj]"], "q_proj is a slice of qkv_proj"),
        (["--model.lora.backend=loralib", "--model.lora.use_dora=true"], "model.lora.backend: peft"),
        (["--model.lora.modules_to_save=[qkv_proj]"], "qkv_proj carries an adapter"),
        (["--model.lora.lora_alpha=0"], "model.lora.lora_alpha"),
        (["--model.lora.adapter=nowhere.ckpt"], "model.lora.adapter: there is no file nowhere.ckpt"),
        (["--model.lora.bias=all"], "no layer of a Phi3ForCausalLM has a bias"),
    ],
)
def test_bad_input_is_one_clear_error(cli, options, told):
    refused = cli("fit", *QUICK, "--trainer.max_steps=1", *options, code=None)
    assert refused.status != 0
    assert told in refused.text
    assert "Traceback" not in refused.text


def test_slices_by_flags_from_a_file(cli, tmp_path):
    (tmp_path / "a.yaml").write_text(
        f"model: {{base: {TINY}, lora: {{backend: loralib, target_modules: [qkv_proj],"
        " enable_lora: {qkv_proj: [true, false, true]}, alpha_pattern: {qkv_proj: 8}}}\n"
    )
    ran = cli("fit", "--config=a.yaml", *QUICK, "--trainer.max_steps=1")
    assert "q_proj of qkv_proj" in ran.text
    assert "v_proj of qkv_proj" in ran.text
    assert "k_proj of qkv_proj" not in ran.text
