"""Lightning's learning rate finder on our module."""

import pytest
import torch
from lightning.pytorch.tuner import Tuner

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.callbacks import RunCheckpoint, Throughput
from phi3_lightning.checkpoint.io import SafeCheckpointIO

BATCHES = [synthetic.batch_of([[synthetic.document(12, 6, seed)]]) for seed in range(40)]

pytestmark = pytest.mark.filterwarnings("ignore:.*`max_epochs` was not set.*")


def test_the_finder_suggests_a_rate_and_leaves_the_adapter_unchanged(tmp_path, tiny_base):
    module = Phi3LoRAModule(tiny_base, dtype="float32", lora={"r": 4, "lora_dropout": 0.1}, optimizer={"lr": 1e-5})
    module.configure_model()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer = synthetic.trainer(
        tmp_path, callbacks=[RunCheckpoint(), Throughput()], plugins=[SafeCheckpointIO()], enable_checkpointing=True,
        max_epochs=2,
    )  # fmt: skip
    finder = Tuner(trainer).lr_find(
        module, synthetic.loader(BATCHES), min_lr=1e-6, max_lr=1.0, num_training=30, early_stop_threshold=None
    )
    assert len(finder.results["lr"]) == 30
    assert 1e-6 < finder.suggestion() < 1.0
    assert module.learning_rate == finder.suggestion() == module.hparams["optimizer"]["lr"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not list(tmp_path.glob(".lr_find*"))

    trainer.fit(module, synthetic.loader(BATCHES))
    assert trainer.global_step == 80
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["optimizer"]["lr"] == finder.suggestion()


def test_learning_rate_is_the_option_of_the_optimiser(tiny_base):
    module = Phi3LoRAModule(tiny_base, dtype="float32")
    module.learning_rate = 3e-4
    assert module.optimizer_config.lr == 3e-4
