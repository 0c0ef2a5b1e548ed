"""Target names that a user writes, and the layers and slices they match."""

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Phi3ForCausalLM

import synthetic
from adapters.conftest import frozen_base
from phi3_lightning.adapters import attach, targets
from phi3_lightning.adapters.coverage import coverage
from phi3_lightning.config import LoRA
from phi3_lightning.config.lora import PHI3_LINEAR_LAYERS
from phi3_lightning.errors import ModelError
from phi3_lightning.model.base import skeleton

# get_peft_model calls gradient checkpointing of transformers by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def model() -> Phi3ForCausalLM:
    return skeleton(synthetic.tiny_config())


def linear_layers(model) -> list[str]:
    return [name for name, m in model.model.named_modules(prefix="model") if isinstance(m, nn.Linear)]


def test_defaults_are_every_linear_layer_of_every_block(model):
    found = paths(resolve(model))
    assert found == linear_layers(model)
    assert len(found) == 4 * model.config.num_hidden_layers


def test_all_linear_is_the_blocks_without_the_head(model):
    assert paths(resolve(model, "all-linear")) == linear_layers(model)


def resolve(model, names=PHI3_LINEAR_LAYERS, **options) -> list[targets.Target]:
    return targets.resolve(model, LoRA(target_modules=names, **options))


def paths(found: list[targets.Target]) -> list[str]:
    return [target.path for target in found]


def adapted(found: list[targets.Target], layer: str) -> set[tuple[str, ...]]:
    return {tuple(target.adapted) for target in found if target.name == layer}


def test_loralib_resolves_llama_names_to_every_slice(model):
    found = resolve(model, LLAMA, backend="loralib")
    assert paths(found) == linear_layers(model)
    assert all(all(target.enabled) for target in found)


def test_peft_resolves_a_complete_set_of_slices_to_the_whole_matrix(model):
    found = resolve(model, LLAMA)
    assert paths(found) == linear_layers(model)
    (qkv, *_) = [target for target in found if target.name == "qkv_proj"]
    assert (qkv.slices, qkv.enabled) == ({"qkv_proj": 64}, (True,))


@pytest.mark.parametrize(
    ("options", "slices"),
    [
        ({"names": ["q_proj", "v_proj"]}, ("q_proj", "v_proj")),
        ({"names": ["self_attn.k_proj"]}, ("k_proj",)),
        ({"names": ["qkv_proj"], "enable_lora": {"qkv_proj": [True, False, True]}}, ("q_proj", "v_proj")),
        ({"names": ["qkv_proj"], "exclude_modules": ["k_proj"]}, ("q_proj", "v_proj")),
        ({"names": "all-linear", "exclude_modules": r".*\.(k|o|up)_proj"}, ("q_proj", "v_proj")),
        ({"names": r".*\.(q|v|down)_proj"}, ("q_proj", "v_proj")),
    ],
)
def test_slices_are_chosen_by_name_flag_exclusion_or_expression(model, options, slices):
    names = options.pop("names")
    found = resolve(model, names, backend="loralib", **options)
    assert adapted(found, "qkv_proj") == {slices}
    with pytest.raises(ModelError, match=r"qkv_proj would be adapted without .*backend: loralib, or name qkv_proj"):
        resolve(model, names, **options)


def test_slices_have_the_rows_of_their_heads(model):
    for target in resolve(model, backend="loralib"):
        layer = model.get_submodule(target.path)
        assert sum(target.slices.values()) == layer.out_features
    (qkv, *_) = [target for target in resolve(model, backend="loralib") if target.name == "qkv_proj"]
    assert qkv.slices == {"q_proj": 32, "k_proj": 16, "v_proj": 16}


@pytest.mark.parametrize("names", [["qkv_proj", "q_proj"], ["up_proj", "model.layers.1.mlp.gate_up_proj"]])
@pytest.mark.parametrize("backend", ["peft", "loralib"])
def test_a_target_inside_another_is_refused(model, names, backend):
    with pytest.raises(ModelError, match=r"is a slice of .*name one of them"):
        resolve(model, names, backend=backend)


def test_enable_lora_and_targets_must_agree(model):
    enabled = {"qkv_proj": [True, False, True]}
    for names in (["o_proj"], ["q_proj"]):
        with pytest.raises(ModelError, match=r"model\.lora\.enable_lora\.qkv_proj: .*say otherwise"):
            resolve(model, names, enable_lora=enabled, backend="loralib")


@pytest.mark.parametrize("blocks", [1, [1]])
def test_layers_to_transform_limits_targets_to_blocks(model, blocks):
    found = resolve(model, layers_to_transform=blocks, layers_pattern="layers")
    assert paths(found) == [path for path in linear_layers(model) if ".layers.1." in path]


@pytest.mark.parametrize("blocks", [2, [0, 7], -1])
def test_a_block_that_does_not_exist_is_named(model, blocks):
    with pytest.raises(ModelError, match=r"model\.lora\.layers_to_transform: there is no block .*; they are 0 to 1"):
        resolve(model, layers_to_transform=blocks)


def test_layers_to_transform_excludes_the_embedding(model):
    with pytest.raises(ModelError, match="embed_tokens matches no layer"):
        resolve(model, ["embed_tokens", "o_proj"], layers_to_transform=0)


@pytest.mark.parametrize("backend", ["peft", "loralib"])
def test_patterns_give_ranks_and_scales_as_in_peft(tiny_base, backend):
    options = {"rank_pattern": {"o_proj": 2, r"layers\.0\.mlp\..*": 8}, "alpha_pattern": {"o_proj": 6}, "r": 4}
    found = resolve(frozen_base(tiny_base), backend=backend, **options)
    plain = LoraConfig(target_modules=list(PHI3_LINEAR_LAYERS), lora_alpha=32, **options)
    theirs = get_peft_model(frozen_base(tiny_base), plain).base_model.model
    for target in found:
        layer = theirs.get_submodule(target.path)
        assert (target.r, target.scaling) == (layer.r["default"], layer.scaling["default"])
    assert {target.r for target in found} == {2, 4, 8}


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_target_is_refused(model, key):
    with pytest.raises(ModelError, match=rf"model\.lora\.{key}: down_prj matches no target"):
        resolve(model, **{key: {"down_prj": 4}})


def test_an_exclusion_that_excludes_nothing_or_all_is_refused(model):
    with pytest.raises(ModelError, match=r"model\.lora\.exclude_modules: k_prj matches no layer"):
        resolve(model, exclude_modules=["k_prj"])
    with pytest.raises(ModelError, match=r"model\.lora\.exclude_modules: .*leaves no target"):
        resolve(model, ["o_proj"], exclude_modules=["o_proj"])


def test_negative_control_plain_peft_adapts_some_layers_silently(tiny_base):
    adapted = get_peft_model(Phi3ForCausalLM.from_pretrained(tiny_base), LoraConfig(target_modules=LLAMA))
    layers = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in adapted.named_modules() if ".lora_A" in name}
    assert layers == {"o_proj", "down_proj"}


@pytest.mark.parametrize(
    "names", [["qkv_prj"], ["qkv_proj", "no_such"], ["proj"], ["self_attn"], "model[.]layers", "x"]
)
def test_a_name_that_matches_nothing_is_refused(model, names):
    with pytest.raises(ModelError, match=r"matches no layer; there are .*qkv_proj"):
        resolve(model, names)


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
    assert sorted(paths(resolve(model, names))) == sorted(expected)


def test_a_tied_head_is_refused():
    tied = skeleton(synthetic.tiny_config(tie_word_embeddings=True))
    with pytest.raises(ModelError, match="lm_head shares its weight"):
        resolve(tied, ["lm_head"])


def test_coverage_counts_what_is_trained(tiny_base):
    model = frozen_base(tiny_base)
    names = ["model.layers.1.self_attn.qkv_proj", "down_proj"]
    adapter = attach(model, LoRA(r=4, target_modules=names, rank_pattern={"layers.0.mlp.down_proj": 2}))
    entries = {entry.layer: entry for entry in coverage(model, adapter)}
    hidden, inner, fused = 32, 64, 64  # 4 query heads and 2 x 2 key and value heads of 8
    qkv, down = entries["qkv_proj"], entries["down_proj"]
    assert (qkv.adapted, qkv.existing, qkv.ranks, qkv.parameters) == (1, 2, (4,), 4 * (hidden + fused))
    assert (down.adapted, down.existing, down.ranks, down.parameters) == (2, 2, (2, 4), 6 * (inner + hidden))


COVERED = [
    ("peft", {"use_dora": True, "modules_to_save": ["lm_head", "norm"]}),
    ("peft", {"target_modules": ["embed_tokens", "lm_head", "o_proj"]}),
    ("loralib", {"target_modules": ["embed_tokens", "q_proj", "up_proj", "gate_proj", "o_proj"]}),
]


@pytest.mark.parametrize(("backend", "options"), COVERED)
def test_coverage_counts_every_trainable_parameter(tiny_base, backend, options):
    model = frozen_base(tiny_base)
    adapter = attach(model, LoRA(backend=backend, **options))
    entries = coverage(model, adapter)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(entry.parameters for entry in entries) == trained
    labels = {entry.layer for entry in entries}
    assert ("q_proj of qkv_proj" in labels) == (backend == "loralib")
    assert ("norm (whole)" in labels) == ("modules_to_save" in options)


def test_paths_are_shortened_where_names_match_the_same_layers(tiny_base):
    model = frozen_base(tiny_base)
    every = paths(resolve(model))
    assert targets.short_names(model, every) == ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"]
    assert targets.short_names(model, every[:1]) == every[:1]
