"""From a configuration, a checkpoint or an adapter to a module that answers."""

import sys
from collections.abc import Mapping
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
from phi3_lightning.hub import split_revision
from phi3_lightning.module import Phi3LoRAModule
from phi3_lightning.run_folder import RunFolder

DATA_KEYS = {"tokenizer": None, "revision": None, "chat_template": None, "special_text": "plain", "system": "keep"}
"""The options of the data section that determine prompts, and their defaults."""


@dataclass(frozen=True)
class LoadedRun:
    """A module that answers, with the options of its run."""

    config: Namespace
    module: Phi3LoRAModule
    """On its device, in evaluation mode."""
    trainer: pl.Trainer
    """With the precision of the run."""
    template: ChatTemplate
    system: Literal["keep", "merge_into_user", "refuse"]
    """As in ``data.system``."""


def open_module(options: LightningArgumentParser, args: list[str]) -> LoadedRun:
    """Load a module with the checkpoint or the adapter that the arguments name, whose own options are the defaults."""
    search = options.parse_args([*args, "--model.base=unknown"])
    source = RunFolder.of(search).checkpoint(search.ckpt_path)
    checkpoint: dict[str, Any] | None = None
    if source is not None and _is_adapter(source):
        options.set_defaults(_adapter_defaults(source))
        args = [*args, f"--model.lora.init_from={source}", "--model.lora.init_lora_weights=true"]
    elif source is not None:
        checkpoint = read_checkpoint(source)
        options.set_defaults(model_defaults(checkpoint.get("hyper_parameters", {})))
    config = options.parse_args(args)
    if checkpoint is not None:
        config.model.lora.init_from = None  # the checkpoint has what it held
    seed_everything(None if config.seed_everything is True else config.seed_everything, verbose=False)
    origin = f"{source}: taken" if source else "no checkpoint: the base answers, or the adapter of model.lora.init_from"
    if source is not None and source.suffix == ".pt" and not source.with_suffix(".json").is_file():
        origin += f"; {NO_SCALE}"
    print(origin, file=sys.stderr, flush=True)

    data = prompt_options(config, checkpoint or {})
    template = ChatTemplate(
        load_tokenizer(data["tokenizer"], data["revision"], data["chat_template"]), data["special_text"]
    )
    module: Phi3LoRAModule = options.instantiate_classes(config).model
    trainer = single_device_trainer(config.trainer, ".")
    module.configure_model()
    if checkpoint is not None:
        check_identity(checkpoint, module.checkpoint_identity() | template.identity)
        module.load_state_dict(checkpoint["state_dict"])
    trainer.precision_plugin.convert_module(module)
    module.to(trainer.strategy.root_device).eval()
    return LoadedRun(config, module, trainer, template, data["system"])


def _is_adapter(path: Path) -> bool:
    if (path / "config.json").is_file():
        raise CheckpointError(f"--ckpt_path: {path} is a whole model; give it as --model.base")
    return path.suffix == ".pt" or adapter_config.is_adapter(path)


def _adapter_defaults(path: Path) -> dict[str, Any]:
    """The options in the files of an adapter; a file of loralib's has none."""
    if not path.is_dir():
        return {"model.lora.backend": "loralib"}
    adapter = adapter_config.read(str(path), "--ckpt_path")
    return model_defaults({"base": adapter.base, "revision": adapter.revision, "lora": dict(adapter.lora)})


def prompt_options(config: Namespace, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of prompts: those of this call, or else those of training, or else the base's."""
    training = dict(checkpoint.get("datamodule_hyper_parameters", {}))
    if config.data.get("tokenizer"):
        training.pop("revision", None)  # of another tokenizer
    data: dict[str, Any] = {
        key: config.data.get(key) or training.get(key) or default for key, default in DATA_KEYS.items()
    }
    if data["tokenizer"] is None:
        named = split_revision("model.base", config.model.base, config.model.revision, "model.revision")
    else:
        named = split_revision("data.tokenizer", data["tokenizer"], data["revision"], "data.revision")
    return data | dict(zip(("tokenizer", "revision"), named, strict=True))
