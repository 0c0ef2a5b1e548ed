"""What a checkpoint holds and what is checked on reading it, on plain dictionaries without a model."""

import pytest
import torch

from phi3_lightning.checkpoint.identity import (
    FORMAT_VERSION,
    IDENTITY,
    check_identity,
    check_moments,
    check_state,
    identity,
    plain_name,
    read_identity,
    without_frozen,
)
from phi3_lightning.errors import CheckpointError

LORA = {"r": 16, "lora_alpha": 32, "use_rslora": False, "lora_dropout": 0.05, "target_modules": ["qkv_proj"]}
LAYERS = {"qkv_proj": 2}
MINE = identity("owner/base", "a" * 64, LORA, LAYERS) | {"tokenizer": "c" * 64, "template": "d" * 64}


def content(**changes) -> dict:
    return {IDENTITY: MINE | changes}


def test_a_matching_checkpoint_is_accepted():
    check_identity(content(), MINE)


@pytest.mark.parametrize("same", [{"lora_dropout": 0.0}, {"target_modules": ["model.layers.0.self_attn.qkv_proj"]}])
def test_options_that_change_no_weight_may_differ(same):
    check_identity(content(lora=LORA | same), MINE)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({}, "not written by phi3_lightning"),
        (content(format_version=FORMAT_VERSION + 1), f"format version {FORMAT_VERSION + 1}"),
        (content(fingerprint="b" * 64, base="owner/other"), r"another base model: .*owner/other.*owner/base"),
        (content(fingerprint="b" * 64, base=None), "another base model: .*a local folder"),
        (content(lora=LORA | {"r": 8}), r"model\.lora\.r is 16 and was 8"),
        (content(lora=LORA | {"lora_alpha": 8}), "lora_alpha is 32 and was 8"),
        (content(lora=LORA | {"use_rslora": True}), "use_rslora is False and was True"),
        (content(lora=LORA | {"use_dora": True}), "use_dora is None and was True"),
        (content(layers={"qkv_proj": 2, "o_proj": 1}), "qkv_proj in 2 layers and adapted qkv_proj in 2.*o_proj in 1"),
        (content(tokenizer="e" * 64), r"another tokenizer \(eeeeeeeeeeee\).*data\.tokenizer"),
        (content(template="e" * 64), r"another template \(e.*data\.chat_template"),
        (content(fingerprint="b" * 64, revision="v1"), "owner/base at v1"),
        (content(format_version=0), "reads 1 to 2"),
    ],
)
def test_a_foreign_checkpoint_is_refused_by_name(checkpoint, message):
    with pytest.raises(CheckpointError, match=message):
        check_identity(checkpoint, MINE)


def test_a_difference_can_be_a_warning(recwarn):
    check_identity(content(tokenizer="e" * 64, lora=LORA | {"r": 8}), MINE, on_mismatch="warn")
    warned = [str(warning.message) for warning in recwarn]
    assert len(warned) == 2
    assert "another tokenizer" in warned[0]
    assert "r is 16 and was 8" in warned[1]
    with pytest.raises(CheckpointError, match="not written by"):
        check_identity({}, MINE, on_mismatch="warn")


def test_the_first_format_is_migrated():
    first = {"format_version": 1, "base": "owner/base", "fingerprint": "a" * 64, "lora": LORA}
    check_identity({IDENTITY: first}, MINE)
    assert read_identity({IDENTITY: first}).keys() == MINE.keys()
    assert read_identity({IDENTITY: first})["format_version"] == FORMAT_VERSION
    with pytest.raises(CheckpointError, match="r is 16 and was 8"):
        check_identity({IDENTITY: first | {"lora": LORA | {"r": 8}}}, MINE)


def test_unknown_values_are_not_compared():
    check_identity(content(tokenizer=None, template=None), MINE)
    check_identity(content(), MINE | {"tokenizer": None, "template": None})


def test_the_packages_are_recorded():
    assert MINE["packages"]["torch"] == torch.__version__


def test_only_named_parameters_are_left_out():
    state = {name: torch.zeros(1) for name in ("base", "adapter", "buffer")}
    assert set(without_frozen(state, {"base"})) == {"adapter", "buffer"}


STATE = {"a.lora_A": torch.zeros(2, 3), "a.lora_B": torch.zeros(3, 2)}


def without(name: str) -> dict:
    return {key: value for key, value in STATE.items() if key != name}


def test_a_matching_state_is_accepted():
    check_state({name: tensor + 1 for name, tensor in STATE.items()}, STATE)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (without("a.lora_B"), r"missing a\.lora_B"),
        (STATE | {"frozen.weight": torch.zeros(1)}, r"unexpected frozen\.weight"),
        (without("a.lora_B") | {"a.lora_b": torch.zeros(3, 2)}, r"missing a\.lora_B; unexpected a\.lora_b"),
        (STATE | {"a.lora_A": torch.full((2, 3), float("nan"))}, r"a\.lora_A is not finite"),
        (STATE | {"a.lora_B": torch.full((3, 2), float("inf"))}, r"a\.lora_B is not finite"),
        (STATE | {"a.lora_A": torch.zeros(3, 2)}, r"a\.lora_A has shape \(3, 2\) instead of \(2, 3\)"),
    ],
)
def test_mismatches_of_a_state_are_named_key_by_key(found, message):
    with pytest.raises(CheckpointError, match=message):
        check_state(found, STATE)


def test_many_mismatches_are_counted():
    many = {f"layer{index}": torch.zeros(1) for index in range(9)}
    with pytest.raises(CheckpointError, match="layer4; and 4 more"):
        check_state({}, many)


def test_moments_that_are_not_finite_are_refused():
    good = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}}
    check_moments([good])
    bad = {"state": {4: {"exp_avg": torch.tensor([0.0, float("nan")])}}}
    with pytest.raises(CheckpointError, match="exp_avg of parameter 4"):
        check_moments([good, bad])


def test_the_prefix_of_compiled_modules_is_removed_from_names():
    assert plain_name("model._orig_mod.layers.0._orig_mod.weight") == "model.layers.0.weight"
    assert plain_name("model.layers.0.weight") == "model.layers.0.weight"


def test_scales_of_quantised_layers_are_frozen_with_their_weights():
    layer = "model.layers.0.mlp.down_proj"
    beside = ["weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4", "SCB", "weight_format"]
    state = {f"{layer}.{name}": torch.zeros(1) for name in [*beside, "lora_A", "lora_B"]}
    assert list(without_frozen(state, {f"{layer}.weight"})) == [f"{layer}.lora_A", f"{layer}.lora_B"]
    assert without_frozen(state, set()) == state
