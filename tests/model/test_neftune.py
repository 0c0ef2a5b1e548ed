"""NEFTune: how strong the noise is, where it is, and when."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.errors import ConfigError
from phi3_lightning.model.neftune import noisy_embeddings

SIZE = 512


def test_noise_is_uniform_within_each_documents_bound_and_zero_on_padding():
    torch.manual_seed(0)
    embedding = nn.Embedding(7, SIZE)
    ids = torch.zeros(2, 10, dtype=torch.int64)
    with noisy_embeddings(embedding, [[4, 6], [3]], alpha=5.0):
        noise = embedding(ids) - embedding.weight[0]
    places = {4: noise[0, :4], 6: noise[0, 4:], 3: noise[1, :3]}
    for tokens, found in places.items():
        bound = 5.0 / (tokens * SIZE) ** 0.5
        # the largest of n uniform values is within 0.99 of the bound but for once in 0.99 ** -n; n is 1536 or more
        assert 0.99 * bound < found.abs().max() <= bound * (1 + 1e-5)
        assert found.mean().abs() < 5 * bound / (3 * found.numel()) ** 0.5  # five standard errors
    assert torch.equal(noise[1, 3:], torch.zeros(7, SIZE))
    assert torch.equal(embedding(ids[0]), embedding.weight[0].expand(10, SIZE))  # no noise afterwards


def losses(folder, alpha: float | None) -> tuple[float, float]:
    options = {"dtype": "float32", "lora": {"lora_dropout": 0.0}, "optimizer": {"lr": 1e-8}}
    module = Phi3LoRAModule(synthetic.save_tiny(folder / "base"), neftune_noise_alpha=alpha, **options)
    batch = [synthetic.batch_of([[synthetic.document(9, 4, 0)]], 0)]
    trainer: pl.Trainer = synthetic.trainer(folder, max_steps=1)
    trainer.fit(module, synthetic.loader(batch), synthetic.loader(batch))
    return trainer.callback_metrics["train/loss"].item(), trainer.callback_metrics["val/loss"].item()


def test_training_is_noisy_and_validation_is_not(tmp_path):
    plain, noisy = losses(tmp_path / "a", None), losses(tmp_path / "b", 5.0)
    assert noisy[0] != plain[0]
    assert noisy[1] == pytest.approx(plain[1], rel=1e-5)  # after one step at 1e-8


def test_the_rest_of_a_pair_has_the_noise_of_its_whole_document(tiny_base):
    options = {"dtype": "float32", "lora": {"lora_dropout": 0.0}, "objective": {"name": "dpo"}}
    module = Phi3LoRAModule(tiny_base, neftune_noise_alpha=5.0, gradient_checkpointing="none", **options)
    module.configure_model()
    module.model.train()
    batch = synthetic.pairs_of([[synthetic.pair(9, 4, 6, 0), synthetic.pair(5, 2, 3, 1)]])
    seen = []
    handle = module.model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    with torch.no_grad():
        module(batch)
        module.model.eval()
        module(batch)
    handle.remove()
    noise = (seen[0] - seen[1])[0]
    lengths, shared = batch["document_lengths"][0], batch["shared_lengths"][0]
    parts = noise.split([length - common for length, common in zip(lengths, shared, strict=True)])
    for part, length in zip(parts, lengths, strict=True):
        bound = 5.0 / (length * 32) ** 0.5
        assert 0.9 * bound < part.abs().max() <= bound * (1 + 1e-5)


@pytest.mark.parametrize("alpha", [0, -1.0])
def test_an_invalid_noise_alpha_is_refused(alpha):
    with pytest.raises(ConfigError, match=r"model\.neftune_noise_alpha"):
        Phi3LoRAModule("base", neftune_noise_alpha=alpha)
