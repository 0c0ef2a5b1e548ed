"""What a checkpoint holds and what is checked when it is read: on dictionaries, without a model."""

import pytest
import torch

from phi3_lightning.checkpoint import (
    FORMAT_VERSION,
    IDENTITY,
    check_identity,
    check_state,
    identity,
    plain_name,
    without_frozen,
)
from phi3_lightning.errors import CheckpointError

LORA = {"r": 16, "lora_alpha": 32, "use_rslora": False, "lora_dropout": 0.05, "target_modules": ["qkv_proj"]}
MINE = identity("owner/base", "a" * 64, LORA)


def written(**changes) -> dict:
    return {IDENTITY: MINE | changes}


def test_the_own_checkpoint_is_taken():
    check_identity(written(), MINE)


@pytest.mark.parametrize("same", [{"lora_dropout": 0.0}, {"target_modules": ["model.layers.0.self_attn.qkv_proj"]}])
def test_what_changes_no_weight_may_differ(same):
    check_identity(written(lora=LORA | same), MINE)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({}, "not written by phi3_lightning"),
        (written(format_version=FORMAT_VERSION + 1), f"format version {FORMAT_VERSION + 1}"),
        (written(fingerprint="b" * 64, base="owner/other"), r"another base model: .*owner/other.*owner/base"),
        (written(fingerprint="b" * 64, base=None), "another base model: .*a local folder"),
        (written(lora=LORA | {"r": 8}), r"model\.lora\.r is 16 and was 8"),
        (written(lora=LORA | {"lora_alpha": 8}), "lora_alpha is 32 and was 8"),
        (written(lora=LORA | {"use_rslora": True}), "use_rslora is False and was True"),
    ],
)
def test_a_foreign_checkpoint_is_refused_by_name(checkpoint, message):
    with pytest.raises(CheckpointError, match=message):
        check_identity(checkpoint, MINE)


def test_only_named_parameters_are_left_out():
    state = {name: torch.zeros(1) for name in ("base", "adapter", "buffer")}
    assert set(without_frozen(state, {"base"})) == {"adapter", "buffer"}


STATE = {"a.lora_A": torch.zeros(2, 3), "a.lora_B": torch.zeros(3, 2)}


def without(name: str) -> dict:
    return {key: value for key, value in STATE.items() if key != name}


def test_a_fitting_state_is_taken():
    check_state({name: tensor + 1 for name, tensor in STATE.items()}, STATE)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (without("a.lora_B"), r"missing a\.lora_B"),
        (STATE | {"frozen.weight": torch.zeros(1)}, r"unexpected frozen\.weight"),
        (without("a.lora_B") | {"a.lora_b": torch.zeros(3, 2)}, r"missing a\.lora_B; unexpected a\.lora_b"),
        (STATE | {"a.lora_A": torch.zeros(3, 2)}, r"a\.lora_A has shape \(3, 2\) instead of \(2, 3\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_key_by_key(found, message):
    with pytest.raises(CheckpointError, match=message):
        check_state(found, STATE)


def test_many_misfits_are_counted():
    many = {f"layer{index}": torch.zeros(1) for index in range(9)}
    with pytest.raises(CheckpointError, match="layer4; and 4 more"):
        check_state({}, many)


def test_the_mark_of_compilation_is_taken_out_of_names():
    assert plain_name("model._orig_mod.layers.0._orig_mod.weight") == "model.layers.0.weight"
    assert plain_name("model.layers.0.weight") == "model.layers.0.weight"


def test_scales_of_quantised_layers_are_frozen_with_their_weights():
    layer = "model.layers.0.mlp.down_proj"
    beside = ["weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4", "SCB", "weight_format"]
    state = {f"{layer}.{name}": torch.zeros(1) for name in [*beside, "lora_A", "lora_B"]}
    assert list(without_frozen(state, {f"{layer}.weight"})) == [f"{layer}.lora_A", f"{layer}.lora_B"]
    assert without_frozen(state, set()) == state
