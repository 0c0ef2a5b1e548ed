"""A 4-bit or 8-bit base: the adapter trains over it, and it never changes."""

import hashlib
import importlib.util

import lightning.pytorch as pl
import pytest
import torch

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.errors import ConfigError, ModelError

BATCH = synthetic.batch_of([[synthetic.document(12, 6, seed)] for seed in range(2)])


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the extra qlora is not installed"
)


def quantized(base: str, kind: str | None) -> Phi3LoRAModule:
    torch.manual_seed(0)
    module = Phi3LoRAModule(
        base, dtype="float32", quantization=kind, lora={"lora_dropout": 0.0}, optimizer={"lr": 1e-2},
        schedule={"name": "constant", "warmup": 0},
    )  # fmt: skip
    module.configure_model()
    return module


def frozen(module: Phi3LoRAModule) -> dict[str, str]:
    return {
        name: hashlib.sha256(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, parameter in module.named_parameters()
        if not parameter.requires_grad
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return synthetic.save_tiny(tmp_path_factory.mktemp("quantized") / "base", hidden_size=64, intermediate_size=128)


@needs_bitsandbytes
@pytest.mark.parametrize(("kind", "bytes_a_weight"), [("nf4", 0.5), ("int8", 1)])
def test_linear_layers_are_quantised_and_logits_close(base, kind, bytes_a_weight):
    module, whole = quantized(base, kind), quantized(base, None)
    small = module.model.get_submodule("model.layers.0.mlp.down_proj.base_layer").weight
    assert small.numel() * small.element_size() == 64 * 128 * bytes_a_weight
    with torch.no_grad():
        near, exact = module(BATCH), whole(BATCH)
    assert not torch.equal(near, exact)
    assert torch.nn.functional.cosine_similarity(near.flatten(), exact.flatten(), dim=0) > 0.95


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_adapter_learns_and_the_base_stays(base, kind, tmp_path):
    module = quantized(base, kind)
    before = frozen(module)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=10, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with torch.no_grad():
        first = module.compute_loss(module(BATCH), module.head, BATCH)[0]
    trainer.fit(module, synthetic.loader([BATCH]))
    with torch.no_grad():
        last = module.compute_loss(module(BATCH), module.head, BATCH)[0]
    assert last < first
    assert frozen(module) == before
    assert {parameter.dtype for parameter in module.trained_parameters()} == {torch.float32}
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    again = Phi3LoRAModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(again.eval()(BATCH), module.eval()(BATCH))


def test_unsupported_quantisation_is_refused(base, monkeypatch):
    with pytest.raises(ConfigError, match=r"model\.quantization: 'fp4'"):
        Phi3LoRAModule(base, quantization="fp4")
    with pytest.raises(ModelError, match="needs trained weights"):  # reported first: no package would help
        Phi3LoRAModule(base, init="random", quantization="nf4").configure_model()
    monkeypatch.setattr("phi3_lightning.model.base.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ModelError, match=r"pip install 'phi3-lightning\[qlora\]'"):
        Phi3LoRAModule(base, quantization="nf4").configure_model()
