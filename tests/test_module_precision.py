"""Under every precision of the Trainer: the base in its own dtype, trainable weights in float32."""

import pytest
import torch

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.errors import ConfigError

PRECISIONS = ["32-true", "bf16-mixed", "bf16-true"]
SCHEDULE = {"name": "constant", "warmup": 0}


def data() -> list:
    return synthetic.loader([synthetic.batch_of([[synthetic.document(16, 10, seed)]]) for seed in range(20)])


def trained(module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.trained_parameters()]


def changed_share(before, after) -> float:
    return torch.cat([(a != b).flatten() for a, b in zip(before, after, strict=True)]).float().mean().item()


def with_start(base: str, **options) -> Phi3LoRAModule:
    return synthetic.randomised(Phi3LoRAModule(base, optimizer={"lr": 1e-5}, schedule=SCHEDULE, **options))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small_updates_are_not_lost(tmp_path, tiny_base, precision, dtype):
    module = with_start(tiny_base, dtype=dtype)
    before = trained(module)
    synthetic.trainer(tmp_path, precision=precision).fit(module, data())
    assert {parameter.dtype for parameter in module.trained_parameters()} == {torch.float32}
    frozen = torch.bfloat16 if precision == "bf16-true" else getattr(torch, dtype)
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {frozen}
    # AdamW moves an entry by about lr a step: 1e-5 is above 100 roundings of float32 at 0.5, and below one of bfloat16
    assert changed_share(before, trained(module)) > 0.99


def test_negative_control_bfloat16_loses_most_small_updates(tmp_path, tiny_base, monkeypatch):
    monkeypatch.delattr(Phi3LoRAModule, "_apply")  # which keeps the dtype of trainable weights
    module = with_start(tiny_base)
    synthetic.trainer(tmp_path, precision="bf16-true", limit_train_batches=0).fit(module, data())
    before = trained(module)
    synthetic.trainer(tmp_path, precision="bf16-true").fit(module, data())
    assert {parameter.dtype for parameter in module.trained_parameters()} == {torch.bfloat16}
    assert changed_share(before, trained(module)) < 0.5


@pytest.mark.parametrize("precision", PRECISIONS)
def test_checkpoint_and_resume_keep_float32(tmp_path, tiny_base, precision):
    module = with_start(tiny_base)
    trainer = synthetic.trainer(tmp_path, precision=precision, max_steps=5)
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {tensor.dtype for tensor in checkpoint["state_dict"].values()} == {torch.float32}
    moments = checkpoint["optimizer_states"][0]["state"].values()
    assert {state[name].dtype for state in moments for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    saved = trained(module)

    resumed = Phi3LoRAModule(tiny_base, optimizer={"lr": 1e-5}, schedule=SCHEDULE)
    trainer = synthetic.trainer(tmp_path, precision=precision, max_steps=5)
    trainer.fit(resumed, data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert all(map(torch.equal, saved, trained(resumed)))
    assert {parameter.dtype for parameter in resumed.trained_parameters()} == {torch.float32}
    state = [value for values in trainer.optimizers[0].state.values() for value in values.values()]
    assert {value.dtype for value in state} == {torch.float32}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rotary_angles_and_token_counts_keep_their_type(tmp_path, tiny_base, precision):
    module = Phi3LoRAModule(tiny_base)
    module.configure_model()
    angles = {name: buffer.clone() for name, buffer in module.model.named_buffers()}
    trainer = synthetic.trainer(tmp_path, precision=precision)
    trainer.fit(module, data(), data())
    assert {name for name, buffer in module.model.named_buffers() if not torch.equal(buffer, angles[name])} == set()
    assert {buffer.dtype for buffer in module.model.buffers()} == {torch.float32}
    assert module.val_metrics.loss.total.dtype == torch.float64


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_matrix_products_are_in_the_dtype_of_the_base(tmp_path, tiny_base, precision):
    module = Phi3LoRAModule(tiny_base, dtype="bfloat16")
    module.configure_model()
    seen = set()
    qkv = "model.layers.0.self_attn.qkv_proj"
    for name in (qkv, f"{qkv}.lora_A.default", f"{qkv}.lora_B.default", "lm_head"):
        module.model.get_submodule(name).register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
    synthetic.trainer(tmp_path, precision=precision, max_steps=1).fit(module, data())
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_validation_is_the_same_under_every_precision(tmp_path, tiny_base, precision):
    module = with_start(tiny_base, dtype="bfloat16")
    (found,) = synthetic.trainer(tmp_path, precision=precision).validate(module, data(), verbose=False)
    (expected,) = synthetic.trainer(tmp_path).validate(with_start(tiny_base, dtype="float32"), data(), verbose=False)
    # bfloat16 keeps 8 bits: each of the logits of size about 1 is off by up to 2^-8, and so is a mean of their losses
    assert found["val/loss"] == pytest.approx(expected["val/loss"], abs=2**-8)


def test_half_precision_without_scaling_is_refused(tmp_path, tiny_base):
    with pytest.raises(ConfigError, match=r"trainer\.precision: '16-true' .*bf16-mixed"):
        synthetic.trainer(tmp_path, precision="16-true").fit(Phi3LoRAModule(tiny_base), data())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_half_precision_base_trains_with_loss_scaling_alone(tmp_path, tiny_base, precision):
    module = Phi3LoRAModule(tiny_base, dtype="float16")
    with pytest.raises(ConfigError, match=r"model\.dtype: 'float16' .*16-mixed"):
        synthetic.trainer(tmp_path, precision=precision).fit(module, data())
