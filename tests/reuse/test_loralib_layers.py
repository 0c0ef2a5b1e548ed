"""loralib's own layers, a convolution among them, in a foreign LightningModule."""

import loralib
import torch
from torch import nn

import synthetic
from phi3_lightning.checkpoint.mixin import TrainableStateMixin


class Patches(TrainableStateMixin):
    """A frozen convolution and a frozen head that loralib adapts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = loralib.Conv2d(3, 8, 2, r=2, lora_alpha=4, merge_weights=False, stride=2)
        self.head = loralib.Linear(8, 1, r=2, merge_weights=False)
        loralib.mark_only_lora_as_trainable(self)

    def forward(self, images):
        return self.head(self.patches(images).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return (self(batch) - 1).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_a_convolution_trains_alone_and_its_checkpoint_is_a_file_of_loralib(tmp_path):
    module = Patches()
    frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    data = synthetic.loader([torch.randn(2, 3, 4, 4) for _ in range(4)])
    trainer = synthetic.trainer(tmp_path, max_epochs=3)
    trainer.fit(module, data, data)
    parameters = dict(module.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    assert not any(torch.equal(parameters[name], value) for name, value in before.items())

    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    expected = loralib.lora_state_dict(module)
    assert state.keys() == expected.keys() == before.keys()
    plain = Patches()
    nn.Module.load_state_dict(plain, state, strict=False)
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(plain(images), module(images))
    again = Patches.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(again(images), module(images))
