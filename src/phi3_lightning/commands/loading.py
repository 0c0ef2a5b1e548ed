"""From a configuration, a checkpoint or an adapter to a module that answers."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch import seed_everything
from lightning.pytorch.cli import LightningArgumentParser

from phi3_lightning.adapters import adapter_config
from phi3_lightning.adapters.init_from import NO_SCALE
from phi3_lightning.checkpoint.identity import check_identity
from phi3_lightning.checkpoint.io import read_checkpoint
from phi3_lightning.commands.parser import model_defaults
from phi3_lightning.commands.single_device import single_device_trainer
from phi3_lightning.data.template import ChatTemplate, load_tokenizer
from phi3_lightning.errors import CheckpointError
from phi3_lightning.module import Phi3LoRAModule
from phi3_lightning.run_folder import RunFolder

DATA_KEYS = {"tokenizer": None, "revision": None, "chat_template": None, "special_text": "plain", "system": "keep"}
"""What the data section says about prompts, and its defaults."""


@dataclass(frozen=True)
class LoadedRun:
    """A module that answers, and what it was opened with.

    Args:
        config: The options.
        module: The module, on its device, in evaluation mode.
        trainer: Knows what it computes in.
        template: Makes prompts.
        system: What becomes of system messages, as in ``data.system``.
    """

    config: Namespace
    module: Phi3LoRAModule
    trainer: pl.Trainer
    template: ChatTemplate
    system: Literal["keep", "merge_into_user", "refuse"]


def open_module(options: LightningArgumentParser, args: list[str]) -> LoadedRun:
    """Load what is to answer. What a checkpoint or an adapter says of itself are the defaults of the options.

    Args:
        options: The parser; it has ``ckpt_path``, ``run``, ``model``, ``data``, ``trainer`` and ``seed_everything``.
        args: The arguments.

    Raises:
        CheckpointError: If checkpoint or adapter cannot be read, or do not belong to the base.
        ConfigError: If options cannot be used.
        ModelError: If the base cannot be loaded.
    """
    asked = options.parse_args([*args, "--model.base=unknown"])
    source = RunFolder.of(asked).checkpoint(asked.ckpt_path)
    checkpoint: dict[str, Any] | None = None
    if source is not None and _is_adapter(source):
        options.set_defaults(_adapter_defaults(source))
        args = [*args, f"--model.lora.init_from={source}", "--model.lora.init_lora_weights=true"]
    elif source is not None:
        checkpoint = read_checkpoint(source)
        options.set_defaults(model_defaults(checkpoint.get("hyper_parameters", {})))
    config = options.parse_args(args)
    seed_everything(None if config.seed_everything is True else config.seed_everything, verbose=False)
    taken = f"{source}: taken" if source else "no checkpoint: the base answers, or the adapter of model.lora.init_from"
    if source is not None and source.suffix == ".pt" and not source.with_suffix(".json").is_file():
        taken += f"; {NO_SCALE}"
    print(taken, file=sys.stderr, flush=True)

    template, system = _template(config, checkpoint)
    module: Phi3LoRAModule = options.instantiate_classes(config).model
    trainer = single_device_trainer(config.trainer, ".")
    module.configure_model()
    if checkpoint is not None:
        check_identity(checkpoint, module.checkpoint_identity() | template.identity)
        module.load_state_dict(checkpoint["state_dict"])
    trainer.precision_plugin.convert_module(module)
    module.to(trainer.strategy.root_device).eval()
    return LoadedRun(config, module, trainer, template, system)


def _is_adapter(path: Path) -> bool:
    if (path / "config.json").is_file():
        raise CheckpointError(f"--ckpt_path: {path} is a whole model; give it as --model.base")
    return path.suffix == ".pt" or adapter_config.is_adapter(path)


def _adapter_defaults(path: Path) -> dict[str, Any]:
    """What the files of an adapter say about it; a file of loralib's says nothing."""
    if not path.is_dir():
        return {"model.lora.backend": "loralib"}
    found = adapter_config.read(str(path), "--ckpt_path")
    return model_defaults({"base": found.base, "revision": found.revision, "lora": dict(found.lora)})


def _template(config: Namespace, checkpoint: dict[str, Any] | None) -> tuple[ChatTemplate, Any]:
    """The template, and where system messages go: as typed now, else as in training, else the base's."""
    trained = {} if checkpoint is None else checkpoint.get("datamodule_hyper_parameters", {})
    data: dict[str, Any] = {
        key: config.data.get(key) or trained.get(key) or default for key, default in DATA_KEYS.items()
    }
    if data["tokenizer"] is None:
        data |= {"tokenizer": config.model.base, "revision": config.model.revision}
    tokenizer = load_tokenizer(data["tokenizer"], data["revision"], data["chat_template"])
    return ChatTemplate(tokenizer, data["special_text"]), data["system"]
