"""Each key of adapter_config.json gives PEFT's own logits, or is refused by name."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from adapters.conftest import frozen_base, logits, randomise, trained
from phi3_lightning.adapters import adapter_config, attach
from phi3_lightning.config import LoRA
from phi3_lightning.errors import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # about keys that PEFT does not read
]

SMALL = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "o_proj"], "task_type": "CAUSAL_LM"}
EMBEDDING = {"target_modules": ["embed_tokens", "o_proj"]}

BY_PEFT = {
    "r": [{"r": 8}],
    "lora_alpha": [{"lora_alpha": 3}],
    "target_modules": [EMBEDDING, {"target_modules": "all-linear"}, {"target_modules": r".*\.1\..*o_proj"}],
    "exclude_modules": [{"exclude_modules": ["o_proj"]}, {"exclude_modules": r".*\.0\..*"}],
    "layers_to_transform": [{"layers_to_transform": 1}, {"layers_to_transform": [0]}],
    "layers_pattern": [{"layers_to_transform": [1], "layers_pattern": p} for p in ("layers", ["layers"])],
    "rank_pattern": [{"rank_pattern": {"o_proj": 2}}, {"rank_pattern": {r"layers\.0\..*": 6}, "use_rslora": True}],
    "alpha_pattern": [{"alpha_pattern": {"qkv_proj": 5}}],
    "use_rslora": [{"use_rslora": True}],
    "use_dora": [{"use_dora": True}, {"use_dora": True} | EMBEDDING, {"use_dora": True, "use_rslora": True}],
    "modules_to_save": [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["model.norm"]}],
    "init_lora_weights": [{"init_lora_weights": start} for start in (True, False, "gaussian", "orthogonal", "mica")],
    "bias": [{"bias": "all"}, {"bias": "lora_only"}],
    "task_type": [{"task_type": None}],
    "lora_dropout": [{"lora_dropout": 0.5}],
}
"""Adapters that PEFT itself makes and saves: the logits here are the same."""

BY_HAND = {
    "init_lora_weights": ["eva", None],
    "auto_mapping": [{"base_model_class": "Phi3ForCausalLM", "parent_library": "transformers", "unsloth_fixed": True}],
    "fan_in_fan_out": [True],
    "inference_mode": [True, False],
    "peft_version": ["0.99.0"],
    "revision": ["main"],
    "base_model_name_or_path": ["", None, "/home/nobody/phi3"],
    "loftq_config": [{"loftq_bits": 4}],
    "eva_config": [{"rho": 2.0}],
    "corda_config": [{"corda_method": "kpm"}],
    "lora_ga_config": [{}],
    "megatron_core": ["megatron.core", None],
    "qalora_group_size": [32],
    "runtime_config": [{"ephemeral_gpu_offload": True}],
    "merge_weights": [True],
    "enable_lora": [None],
    "lora_dtype": ["fp32"],
    "lorap_emb_lr": [1e-6],
    "lorap_lr_ratio": [16.0],
    "a_key_of_tomorrow": [None, False, {}, []],
}
"""Values written into the file of a plain adapter: PEFT ignores them in a trained adapter, and so do we."""

REFUSED = {
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "OLoRA", "loftq", "corda", "lora_ga", "of tomorrow"],
    "peft_type": ["ADALORA", "IA3", "LOHA", "LOKR", "VERA", "PREFIX_TUNING", "XLORA", "lora", None],
    "task_type": ["SEQ_CLS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"],
    "layers_pattern": ["h"],
    "layer_replication": [[[0, 2], [1, 2]]],
    "alora_invocation_tokens": [[5, 6]],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [1]}],
    "target_parameters": [["o_proj.weight"]],
    "lora_bias": [True],
    "use_qalora": [True],
    "use_bdlora": [{"nblocks": 2}],
    "megatron_config": [{"tensor_model_parallel_size": 1}],
    "arrow_config": [{"top_k": 2}],
    "kasa_config": [{}, {"beta": 0.1}],
    "monteclora_config": [{}],
    "velora_config": [{"num_groups": 4}],
    "ensure_weight_tying": [True],
    "enable_lora": [[True, False, True]],
    "a_key_of_tomorrow": [True, 1, "on", {"beta": 0}],
    "r": ["4", 0, 4.5],
    "lora_alpha": ["8", -1],
    "rank_pattern": [["o_proj"], {"o_proj": "2"}],
    "use_dora": ["yes"],
    "base_model_name_or_path": [3],
}
"""Values of adapters that are not supported here, or of no adapter at all."""


def cases(table) -> list:
    return [pytest.param(key, value, id=f"{key}={value}") for key, values in table.items() for value in values]


def save_with_peft(base: str, folder: Path, **options) -> Path:
    """Save an adapter with PEFT, with weights that move every logit."""
    model = get_peft_model(frozen_base(base), LoraConfig(**SMALL | options))
    randomise(trained(model).values())
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def with_keys(folder: Path, **keys) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return folder


def peft_logits(base: str, folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(frozen_base(base), folder).eval()).detach()


def our_logits(base: str, folder: Path) -> torch.Tensor:
    """Load as ``chat --ckpt_path FOLDER`` does: the keys of the file are those of the section."""
    found = adapter_config.read(str(folder), "--ckpt_path")
    model = frozen_base(base)
    attach(model, LoRA(**found.lora, init_from=str(folder)))
    return logits(model.eval()).detach()


@pytest.mark.parametrize(("key", "options"), cases(BY_PEFT))
def test_an_adapter_saved_by_peft_gives_the_same_logits(tiny_base, tmp_path, key, options):
    folder = save_with_peft(tiny_base, tmp_path, **options)
    expected = peft_logits(tiny_base, folder)
    torch.testing.assert_close(our_logits(tiny_base, folder), expected)
    assert (expected - logits(frozen_base(tiny_base))).abs().max() > 0.1  # the adapter does something


@pytest.mark.parametrize(("key", "value"), cases(BY_HAND))
def test_keys_that_peft_ignores_change_nothing(tiny_base, tmp_path, key, value):
    plain = peft_logits(tiny_base, save_with_peft(tiny_base, tmp_path))
    folder = with_keys(tmp_path, **{key: value})
    torch.testing.assert_close(peft_logits(tiny_base, folder), plain)
    torch.testing.assert_close(our_logits(tiny_base, folder), plain)


@pytest.mark.parametrize(("key", "value"), cases(REFUSED))
def test_an_unsupported_adapter_is_refused_and_its_key_named(tiny_base, tmp_path, key, value):
    folder = with_keys(save_with_peft(tiny_base, tmp_path), **{key: value})
    if key == "layers_pattern":
        with_keys(folder, layers_to_transform=[0])
    with pytest.raises(CheckpointError, match=rf"^--ckpt_path: {folder}: adapter_config\.json: {key}"):
        adapter_config.read(str(folder), "--ckpt_path")
    with pytest.raises(CheckpointError, match=rf"^model\.lora\.init_from: {folder}: adapter_config\.json: {key}"):
        attach(frozen_base(tiny_base), LoRA(**SMALL, init_from=str(folder)))


def test_every_key_of_pefts_config_is_in_a_table():
    known = {*adapter_config.TAKEN, *adapter_config.HARMLESS, *adapter_config.REFUSED, *adapter_config.CHECKED}
    assert {field.name for field in fields(LoraConfig)} - known == set()
    tried = {*BY_PEFT, *BY_HAND, *REFUSED}
    assert known - tried == set()


def test_the_suggested_conversion_of_an_adapter_that_rewrote_the_base_works(tiny_base, tmp_path):
    model = get_peft_model(frozen_base(tiny_base), LoraConfig(**SMALL, init_lora_weights="pissa"))
    model.save_pretrained(tmp_path / "start")
    randomise(trained(model).values())
    expected = logits(model.eval()).detach()
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(CheckpointError, match=r"'pissa' changes the base weights.*path_initial_model_for_weight_conv"):
        our_logits(tiny_base, tmp_path / "trained")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    torch.testing.assert_close(our_logits(tiny_base, tmp_path / "converted"), expected, rtol=1e-4, atol=1e-4)
