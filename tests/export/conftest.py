"""Adapters with random trained values on tiny models, and their exports."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import Phi3ForCausalLM

import synthetic
from phi3_lightning.adapters.adapter import PeftForm
from phi3_lightning.export.options import find_converter

FOUR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]

ADAPTERS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"qkv_proj": 3}},
    "head trained whole": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "qkv_proj"]},
    "embedding with dora": {"target_modules": ["embed_tokens", "qkv_proj"], "use_dora": True},
}
BASES = {"MHA": {"num_key_value_heads": 4}, "GQA": {}, "tied": {"tie_word_embeddings": True}}


def peft_model(base: Phi3ForCausalLM, **options):
    """A model adapted by PEFT with random trained values, as the oracle, and its PeftForm."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": FOUR} | options)
    model = get_peft_model(base, config).eval()
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    return model, PeftForm(config, get_peft_model_state_dict(model, save_embedding_layers=False))


@pytest.fixture
def base_folder(tmp_path) -> Callable[..., Path]:
    """A function that writes a tiny base and returns its folder."""

    def write(dtype: torch.dtype = torch.float32, **changes) -> Path:
        return Path(synthetic.save_tiny(tmp_path / "base", dtype, **changes))

    return write


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """The folder of llama.cpp's converters."""
    folder = os.environ.get("PHI3_LIGHTNING_LLAMA_CPP")
    if folder is None:
        pytest.skip("PHI3_LIGHTNING_LLAMA_CPP does not name a folder of llama.cpp")
    return find_converter(folder).parent
