"""Names of version 0.0: a call with one is refused with the new name, and a checkpoint with them loads."""

import pytest
import torch

import synthetic
from phi3_lightning import ChatDataModule, Phi3LoRAModule, renamed
from phi3_lightning.callbacks import RunCheckpoint
from phi3_lightning.checkpoint.io import SafeCheckpointIO, read_checkpoint
from phi3_lightning.errors import ConfigError

OLD_OPTIONS = {new: old for old, new in renamed.OPTIONS.items()}
SMALL = {"r": 4, "target_modules": ["o_proj"]}


def test_an_old_option_in_a_script_is_refused_with_its_new_name():
    with pytest.raises(ConfigError, match=r"^data\.roles: it is called data\.role_map now"):
        ChatDataModule(train="chats.jsonl", roles={"customer": "user"})
    with pytest.raises(ConfigError, match=r"^model\.lora\.adapter: it is called model\.lora\.init_from now"):
        Phi3LoRAModule("base", lora={"adapter": "folder"})
    with pytest.raises(ConfigError, match=r"^checkpoint\.monitor: 'forgetting/kl' is called base_drift/kl now"):
        RunCheckpoint(monitor="forgetting/kl")


def test_an_unknown_option_in_a_script_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"^data\.batch: there is no such option; did you mean batch_size"):
        ChatDataModule(train="chats.jsonl", batch=4)


def old_names(section, path):
    """The options of a section under the names they had."""
    result = {}
    for name, value in section.items():
        key = f"{path}.{name}"
        result[OLD_OPTIONS.get(key, key).removeprefix(f"{path}.")] = old_names(value, key) if name == "lora" else value
    return result


@pytest.fixture
def old_checkpoint(tmp_path, tiny_base):
    """A checkpoint in the old form, and its adapter tensors."""
    module = Phi3LoRAModule(tiny_base, dtype="float32", lora=SMALL)
    loader = synthetic.loader([synthetic.batch_of([[synthetic.document(9, 5, 0)]])])
    trainer = synthetic.trainer(tmp_path, max_steps=1)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = read_checkpoint(tmp_path / "new.ckpt")
    checkpoint["hyper_parameters"] = old_names(checkpoint["hyper_parameters"], "model")
    data = ChatDataModule(train="chats.jsonl", role_map={"customer": "user"}, truncation="split")
    checkpoint["datamodule_hyper_parameters"] = old_names(dict(data.hparams), "data")
    checkpoint["callbacks"] = {"Forgetting": {"base": 1.0}, "RunCheckpoint": {"monitor": "forgetting/kl"}}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    return tmp_path / "old.ckpt", checkpoint["state_dict"]


def test_an_old_checkpoint_has_old_names(old_checkpoint):
    raw = torch.load(old_checkpoint[0], weights_only=True)
    assert {"adapter", "r"} <= raw["hyper_parameters"]["lora"].keys()
    assert "compile" in raw["hyper_parameters"]
    assert {"roles", "overlong", "conversation_id"} <= raw["datamodule_hyper_parameters"].keys()


def test_an_old_checkpoint_is_read_with_the_new_names(old_checkpoint):
    checkpoint = SafeCheckpointIO().load_checkpoint(old_checkpoint[0])
    assert "init_from" in checkpoint["hyper_parameters"]["lora"]
    assert "torch_compile" in checkpoint["hyper_parameters"]
    assert checkpoint["datamodule_hyper_parameters"]["role_map"] == {"customer": "user"}
    assert checkpoint["callbacks"] == {"BaseDrift": {"base": 1.0}, "RunCheckpoint": {"monitor": "base_drift/kl"}}


def test_an_old_checkpoint_loads_with_load_from_checkpoint(old_checkpoint):
    path, tensors = old_checkpoint
    module = Phi3LoRAModule.load_from_checkpoint(path, weights_only=True)
    assert module.lora.r == 4
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in tensors.items())
    data = ChatDataModule.load_from_checkpoint(path, weights_only=True)
    assert (data.options.role_map, data.options.truncation) == ({"customer": "user"}, "split")


def test_a_current_checkpoint_is_unchanged(tmp_path, old_checkpoint):
    path = tmp_path / "new.ckpt"
    assert renamed.translated(path) == path
