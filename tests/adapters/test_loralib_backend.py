"""The loralib backend against plain loralib, and against PEFT with the same A and B."""

import copy

import loralib
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

import synthetic
from adapters.conftest import frozen_base, logits, logits_and_gradients, randomise, trained
from phi3_lightning.adapters import attach, targets
from phi3_lightning.adapters.convert import block_diagonal
from phi3_lightning.adapters.dropout import Dropout
from phi3_lightning.adapters.loralib_backend import LoralibAdapter
from phi3_lightning.config import LoRA
from phi3_lightning.config.lora import PHI3_FUSED_LAYERS
from phi3_lightning.errors import CheckpointError

# PEFT calls gradient checkpointing of transformers by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SHAPES = {"mini": {"num_key_value_heads": 4}, "gqa": {}, "tied": {"tie_word_embeddings": True}}
EVERYWHERE = ["embed_tokens", "qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
U = 2.0**-9  # the largest relative error of a rounding to bfloat16


def section(**options) -> LoRA:
    return LoRA(**{"backend": "loralib", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0} | options)


@pytest.fixture(params=SHAPES)
def base(request, tmp_path) -> str:
    return synthetic.save_tiny(tmp_path / "base", **SHAPES[request.param])


# ---------------------------------------------------------------------- plain loralib


def plain_loralib(model, lora: LoRA, enabled: dict[str, list[bool]]):
    """As the cookbook does it: each target is replaced by a loralib layer with the same weight."""
    common = {"r": lora.r, "lora_alpha": lora.lora_alpha, "merge_weights": False}
    linear = common | {"lora_dropout": lora.lora_dropout, "bias": False}
    for path, old in list(model.named_modules()):
        name = path.rpartition(".")[2]
        if name in enabled:
            new = loralib.MergedLinear(old.in_features, old.out_features, enable_lora=enabled[name], **linear)
        elif name in ("o_proj", "down_proj"):
            new = loralib.Linear(old.in_features, old.out_features, **linear)
        elif name == "embed_tokens":
            new = loralib.Embedding(old.num_embeddings, old.embedding_dim, padding_idx=old.padding_idx, **common)
        else:
            continue
        new.weight.data = old.weight.data
        if isinstance(new.lora_dropout, torch.nn.Dropout):
            new.lora_dropout = Dropout(new.lora_dropout.p)  # the same numbers for the same seed
        model.set_submodule(path, new)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    loralib.mark_only_lora_as_trainable(model)
    return model


ENABLED = [
    {"qkv_proj": [True, True, True], "gate_up_proj": [True, True]},
    {"qkv_proj": [True, False, True], "gate_up_proj": [False, True]},
]


@pytest.mark.parametrize("enabled", ENABLED)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tied", [False, True])
def test_equal_slices_give_the_logits_and_gradients_of_plain_loralib(tmp_path, enabled, dropout, tied):
    folder = synthetic.save_tiny(tmp_path / "base", num_key_value_heads=4, tie_word_embeddings=tied)
    lora = section(lora_dropout=dropout, target_modules=EVERYWHERE, enable_lora=enabled)
    ours = frozen_base(folder)
    attach(ours, lora)
    theirs = plain_loralib(frozen_base(folder), lora, enabled)
    assert {name: p.shape for name, p in trained(ours).items()} == {
        name: p.shape for name, p in trained(theirs).items()
    }
    randomise(trained(ours).values())
    theirs.load_state_dict(loralib.lora_state_dict(ours), strict=False)
    (answers, gradients), (expected, expected_gradients) = map(logits_and_gradients, (ours, theirs))
    torch.testing.assert_close(answers, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name])


def test_state_files_are_exchanged_with_plain_loralib(tmp_path):
    folder = synthetic.save_tiny(tmp_path / "base", num_key_value_heads=4)
    lora = section(target_modules=EVERYWHERE, enable_lora=ENABLED[1])
    ours, theirs = frozen_base(folder), plain_loralib(frozen_base(folder), lora, ENABLED[1])
    adapter = LoralibAdapter(ours, lora)
    randomise(trained(theirs).values())
    adapter.load(loralib.lora_state_dict(theirs), "a plain file")
    torch.testing.assert_close(logits(ours), logits(theirs))
    state = adapter.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in loralib.lora_state_dict(theirs).items())
    keys = theirs.load_state_dict(state, strict=False)
    assert not keys.unexpected_keys
    assert not [name for name in keys.missing_keys if "lora_" in name]


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_state_that_does_not_fit_is_named(tiny_base, change):
    adapter = LoralibAdapter(frozen_base(tiny_base), section())
    state = dict(adapter.state_dict())
    name = "model.layers.1.self_attn.qkv_proj.lora_A"
    if change == "missing":
        del state[name]
    elif change == "unexpected":
        state["model.layers.2.self_attn.qkv_proj.lora_A"] = state[name]
    else:
        state[name] = state[name][:1]
    with pytest.raises(CheckpointError, match=r"a\.pt: .*qkv_proj\.lora_A"):
        adapter.load(state, "a.pt")


def test_each_layer_is_one_of_loralib(base):
    model = frozen_base(base)
    attach(model, section(target_modules=EVERYWHERE))
    block = model.model.layers[0]
    for layer, kind in [
        (block.self_attn.qkv_proj, loralib.MergedLinear),
        (block.mlp.gate_up_proj, loralib.MergedLinear),
        (block.self_attn.o_proj, loralib.Linear),
        (block.mlp.down_proj, loralib.Linear),
        (model.model.embed_tokens, loralib.Embedding),
    ]:
        assert isinstance(layer, kind)
        assert not layer.merge_weights


def test_negative_control_plain_merged_linear_adapts_the_wrong_rows_of_unequal_slices():
    """The heads 6 + 3 + 3 divide by 3: plain loralib silently takes slices of 4 rows."""
    plain = loralib.MergedLinear(5, 12, r=2, enable_lora=[False, True, False], merge_weights=False, bias=False)
    nn.init.ones_(plain.lora_B)
    assert plain.merge_AB().abs().sum(1).nonzero().flatten().tolist() == [4, 5, 6, 7]
    right = block_diagonal(torch.ones(3, 2), [6, 3, 3], [False, True, False]) @ torch.ones(2, 5)
    assert right.abs().sum(1).nonzero().flatten().tolist() == [6, 7, 8]


# ---------------------------------------------------------------------- PEFT


def opened_in_plain_peft(adapter, folder, base: str, dtype=torch.float32) -> PeftModel:
    form = adapter.to_peft()
    form.config.save_pretrained(folder)
    save_file(form.tensors, folder / "adapter_model.safetensors")
    return PeftModel.from_pretrained(frozen_base(base, dtype), folder, is_trainable=True)


SLICES = {
    "all": {},
    "query and value": {"target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"]},
    "one": {"target_modules": ["k_proj"]},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 16}},
    "embedding": {"target_modules": EVERYWHERE},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("name", SLICES)
def test_plain_peft_gives_equal_logits_and_gradients_after_export(base, tmp_path, name):
    lora = section(**SLICES[name])
    ours = frozen_base(base)
    adapter = attach(ours, lora)
    randomise(adapter.parameters())
    theirs = opened_in_plain_peft(adapter, tmp_path, base)
    assert not torch.allclose(logits(ours), logits(frozen_base(base)))
    (answers, gradients), (expected, expected_gradients) = map(logits_and_gradients, (ours, theirs))
    torch.testing.assert_close(answers, expected)
    for target in adapter.targets:
        kind = "lora_embedding_{}.default" if target.embedding else "lora_{}.default.weight"
        down, up = (expected_gradients[f"base_model.model.{target.path}.{kind.format(half)}"] for half in "AB")
        on = sum(target.enabled)
        torch.testing.assert_close(gradients[f"{target.path}.lora_A"], down[: on * target.r])
        rows = up.split(list(target.slices.values()))
        blocks = [rows[index] for index, enabled in enumerate(target.enabled) if enabled]
        mine = gradients[f"{target.path}.lora_B"].split([len(block) for block in blocks])
        folded = target.scaling / (theirs.peft_config["default"].lora_alpha / theirs.peft_config["default"].r)
        for index, (block, own) in enumerate(zip(blocks, mine, strict=True)):
            torch.testing.assert_close(own, block[:, index * target.r : (index + 1) * target.r] * folded)


def test_the_whole_adapter_has_one_rank_and_one_alpha(base):
    model = frozen_base(base)
    form = attach(model, section(**SLICES["ranks"])).to_peft()
    assert (form.config.r, form.config.rank_pattern, form.config.alpha_pattern) == (12, {}, {})
    assert form.config.lora_alpha == 24
    assert {tensor.shape[0] for name, tensor in form.tensors.items() if "lora_A" in name} == {12}
    assert {tensor.dtype for tensor in form.tensors.values()} == {torch.float32}


@pytest.mark.parametrize("names", [["v_proj"], ["q_proj", "up_proj"]])
def test_disabled_slices_stay_exactly_what_they_were(base, tmp_path, names):
    """This holds in the live model, after conversion, and after PEFT has merged."""
    model, plain = frozen_base(base), frozen_base(base)
    adapter = attach(model, section(target_modules=names))
    randomise(adapter.parameters())
    merged = opened_in_plain_peft(adapter, tmp_path, base).merge_and_unload()
    form = adapter.to_peft()
    for target in adapter.targets:
        layer, old, new = (m.get_submodule(target.path) for m in (model, plain, merged))
        x = torch.randn(7, old.in_features)
        up = form.tensors[f"base_model.model.{target.path}.lora_B.weight"]
        sizes = list(target.slices.values())
        parts = zip(layer(x).split(sizes, -1), old(x).split(sizes, -1), up.split(sizes), strict=True)
        weights = zip(new.weight.split(sizes), old.weight.split(sizes), strict=True)
        for on, (answer, base_answer, rows), (after, before) in zip(target.enabled, parts, weights, strict=True):
            assert torch.equal(answer, base_answer) != on
            assert torch.equal(after, before) != on
            assert bool(rows.any()) == on


# ---------------------------------------------------------------------- bfloat16, at real sizes


class Block(nn.Module):
    """A single fused layer, under a path that targets match."""

    def __init__(self, rows: int, inputs: int) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(inputs, rows, bias=False)


def within(found: torch.Tensor, exact: torch.Tensor, bound: float) -> bool:
    return ((found.double() - exact).norm() <= bound).item()


def rounded(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().bfloat16().double() for tensor in tensors]


@pytest.mark.parametrize("slices", [(3072, 3072, 3072), (3072, 1024, 1024)], ids=["mini", "gqa"])
@pytest.mark.parametrize("backend", ["peft", "loralib"])
def test_both_backends_are_within_bfloat16_rounding(slices, backend):
    """Each intermediate is rounded once: A, B, A x, B A x, its factor, the base's output and the sum.

    A rounding moves each entry by at most U of itself. Over random operands a product's norm moves by at most U of its
    own for each rounded factor, so that the output is off by U (|W x| + 5 |s B A x| + |y|), the gradients of A and B by
    5 U of themselves: two factors, two products and the factor.
    """
    torch.manual_seed(0)
    holder = Block(sum(slices), 3072).bfloat16().requires_grad_(False)
    target = targets.Target("qkv_proj", dict(zip("qkv", slices, strict=True)), (True, False, True), 16, 2.0)
    down, up = torch.randn(32, 3072) / 55, torch.randn(slices[0] + slices[2], 16) / 8
    x = torch.randn(1, 24, 3072).bfloat16()
    wide = block_diagonal(up, slices, target.enabled)
    if backend == "loralib":
        from phi3_lightning.adapters.loralib_layers import adapt

        adapt(holder.qkv_proj, target, 0.0)
        layer = holder.qkv_proj
        layer.lora_A.data, layer.lora_B.data = down, up
        weights = [layer.lora_A, layer.lora_B]
    else:
        from peft import LoraConfig

        layer = get_peft_model(holder, LoraConfig(r=32, lora_alpha=64, target_modules=["qkv_proj"])).base_model.model
        layer = layer.qkv_proj
        layer.lora_A.default.weight.data, layer.lora_B.default.weight.data = down, wide
        weights = [layer.lora_A.default.weight, layer.lora_B.default.weight]
    g = torch.randn(1, 24, sum(slices)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = layer(x)
    d_down, d_up = torch.autograd.grad(answer, weights, g)

    a, b, x64, g64, w = rounded(down, wide, x[0], g[0], (holder if backend == "loralib" else layer).state_dict().get(
        "qkv_proj.weight" if backend == "loralib" else "base_layer.weight"))  # fmt: skip
    base_answer, low = x64 @ w.T, x64 @ a.T
    update = 2.0 * low @ b.T
    exact = base_answer + update
    bound = U * (base_answer.norm() + 5 * update.norm() + exact.norm())
    assert within(answer[0], exact, bound)
    assert not within(answer[0], exact + 0.05 * update, bound)  # the bound is tight enough to see 5 per cent
    exact_a, exact_b = (2.0 * (g64 @ b)).T @ x64, 2.0 * g64.T @ low
    if backend == "loralib":
        rows = exact_b.split(slices)
        exact_b = torch.cat([rows[0][:, :16], rows[2][:, 16:]])
    for gradient, exact in ((d_down, exact_a), (d_up, exact_b)):
        assert within(gradient, exact, 5 * U * exact.norm())
        assert not within(gradient, 1.05 * exact, 5 * U * exact.norm())


# ---------------------------------------------------------------------- other properties of the layers


def test_the_dense_delta_is_that_of_the_forward(base):
    model = frozen_base(base)
    adapter = attach(model, section(target_modules=["q_proj", "v_proj"]))
    randomise(adapter.parameters())
    layer = model.model.layers[0].self_attn.qkv_proj
    x = torch.randn(5, layer.in_features)
    expected = x @ (layer.weight + layer.merge_AB() * layer.scaling).T
    torch.testing.assert_close(layer(x), expected)


def test_a_model_with_an_adapter_can_be_copied(tiny_base):
    model = frozen_base(tiny_base)
    randomise(attach(model, section()).parameters())
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_slices_are_split_as_transformers_splits_them(tiny_base):
    """gate_up_proj is chunked in two and qkv_proj split by heads: a delta of v alone must move v alone."""
    model = frozen_base(tiny_base)
    (qkv, *_) = [t for t in targets.resolve(model, section()) if t.name == "qkv_proj"]
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    assert list(qkv.slices) == list(PHI3_FUSED_LAYERS["qkv_proj"])
    assert list(qkv.slices.values()) == [head * 4, head * 2, head * 2]
