"""Names that the user writes, and the layers that exist."""

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Phi3ForCausalLM

import synthetic
from phi3_lightning.adapters import targets
from phi3_lightning.adapters.peft_backend import PeftAdapter
from phi3_lightning.config import PHI3_LINEAR_LAYERS, LoRA
from phi3_lightning.errors import ModelError
from phi3_lightning.model.base import skeleton

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def model() -> Phi3ForCausalLM:
    return skeleton(synthetic.tiny_config())


def linear_layers(model) -> list[str]:
    return [name for name, m in model.model.named_modules(prefix="model") if isinstance(m, nn.Linear)]


def test_defaults_are_every_linear_layer_of_every_block(model):
    found = targets.resolve(model, list(PHI3_LINEAR_LAYERS))
    assert found == linear_layers(model)
    assert len(found) == 4 * model.config.num_hidden_layers


def test_all_linear_is_the_blocks_without_the_head(model):
    assert targets.resolve(model, "all-linear") == linear_layers(model)


@pytest.mark.parametrize("names", [LLAMA, ["q_proj"], ["gate_proj", "down_proj"]])
def test_llama_names_are_refused_with_the_fused_ones(model, names):
    with pytest.raises(ModelError) as caught:
        targets.resolve(model, names)
    message = str(caught.value)
    assert message.startswith("model.lora.target_modules: ")
    for name in set(names) & set(targets.FUSED):
        assert f"{name} in {targets.FUSED[name]}" in message
    assert all(layer in message for layer in PHI3_LINEAR_LAYERS)


# get_peft_model asks transformers for gradient checkpointing by its old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_alone_would_adapt_a_part_without_a_word(tiny_base):
    adapted = get_peft_model(Phi3ForCausalLM.from_pretrained(tiny_base), LoraConfig(target_modules=LLAMA))
    layers = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in adapted.named_modules() if ".lora_A" in name}
    assert layers == {"o_proj", "down_proj"}


@pytest.mark.parametrize(
    "names", [["qkv_prj"], ["qkv_proj", "no_such"], ["proj"], ["self_attn"], "model[.]layers", "x"]
)
def test_a_name_that_matches_nothing_is_refused(model, names):
    with pytest.raises(ModelError, match=r"matches no layer; there are .*qkv_proj"):
        targets.resolve(model, names)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["qkv_proj"], ["model.layers.0.self_attn.qkv_proj", "model.layers.1.self_attn.qkv_proj"]),
        (["model.layers.1.mlp.down_proj"], ["model.layers.1.mlp.down_proj"]),
        (["self_attn.o_proj"], ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]),
        (r".*layers\.1\..*(qkv|o)_proj", ["model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.qkv_proj"]),
        (["lm_head"], ["lm_head"]),
        (["embed_tokens"], ["model.embed_tokens"]),
    ],
)
def test_names_paths_and_expressions_find_their_layers(model, names, expected):
    assert sorted(targets.resolve(model, names)) == sorted(expected)


def test_a_tied_head_is_refused():
    tied = skeleton(synthetic.tiny_config(tie_word_embeddings=True))
    with pytest.raises(ModelError, match="lm_head shares its weight"):
        targets.resolve(tied, ["lm_head"])


def test_coverage_counts_what_is_trained(tiny_base):
    model = Phi3ForCausalLM.from_pretrained(tiny_base).requires_grad_(False)
    adapter = PeftAdapter(model, LoRA(r=4, target_modules=["model.layers.1.self_attn.qkv_proj", "down_proj"]))
    entries = {entry.layer: entry for entry in targets.coverage(model, adapter.targets)}
    hidden, inner, fused = 32, 64, 64  # 4 query heads and 2 x 2 key and value heads of 8
    assert (entries["qkv_proj"].adapted, entries["qkv_proj"].existing) == (1, 2)
    assert entries["qkv_proj"].parameters == 4 * (hidden + fused)
    assert (entries["down_proj"].adapted, entries["down_proj"].existing) == (2, 2)
    assert entries["down_proj"].parameters == 2 * 4 * (inner + hidden)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(entry.parameters for entry in entries.values()) == trained
