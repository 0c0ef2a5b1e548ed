"""The command line: LightningCLI over the two classes, with one folder a run."""

import logging
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from transformers.utils.logging import disable_progress_bar
from typing_extensions import override

from phi3_lightning.callbacks import (
    AgreedStop,
    AutoBatchSize,
    AutoCheckpointing,
    EvaluationReport,
    LineProgress,
    Monitor,
    OutOfMemory,
    PredictionWriter,
    PurgeOvertaken,
    RankFailure,
    RunCheckpoint,
    RunReport,
    SingleWriter,
)
from phi3_lightning.callbacks.monitor import GENERAL
from phi3_lightning.checkpoint.averaging import check_averaging
from phi3_lightning.checkpoint.changed_options import changed_options
from phi3_lightning.checkpoint.io import SafeCheckpointIO, read_checkpoint
from phi3_lightning.commands import chat, check, export, init, plan, preview
from phi3_lightning.commands.parser import Parser
from phi3_lightning.commands.refusal import refusal
from phi3_lightning.commands.save_config import SaveRunConfig
from phi3_lightning.commands.trainer_options import check_ranges, refused_by_name, without_extras
from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.distributed.fsdp2 import check_launcher
from phi3_lightning.errors import DataError
from phi3_lightning.files import remedy, writing
from phi3_lightning.hardware import check_accelerator, check_platform
from phi3_lightning.module import Phi3LoRAModule
from phi3_lightning.run_folder import Resume, RunFolder, nothing_left

DESCRIPTION = "Fine-tune Phi-3 with LoRA on chat data, evaluate it, and let it answer."

COMMANDS = {"init": init, "preview": preview, "check": check, "plan": plan, "chat": chat, "export": export}
"""Commands that are not the Trainer's; each module has a ``main`` and a ``DESCRIPTION``."""


class Phi3CLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` over a run folder.

    Args:
        args: The command line; None: ``sys.argv``.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        given = sys.argv[1:] if args is None else args
        if given[:1] in (["-h"], ["--help"]):
            self._parsed = set()
        else:
            self._parsed = set(given[:1]) & set(self.subcommands()) or set(self.subcommands())
        super().__init__(
            Phi3LoRAModule,
            ChatDataModule,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": True},
            trainer_defaults={"enable_model_summary": False},  # the table of adapted layers says more
            seed_everything_default=42,
            parser_class=Parser,
            parser_kwargs={
                "description": DESCRIPTION,
                "epilog": " ".join(f"{name}: {command.DESCRIPTION}" for name, command in COMMANDS.items()),
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=str, default="phi3-lora", help="Name of the run: its folder is runs/NAME.")
        parser.add_class_arguments(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(EvaluationReport, "evaluation")
        parser.add_class_arguments(Monitor, "monitor")

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand not in self._parsed:  # its options, which take a second to collect, will not be asked for
            self._subcommand_method_arguments[subcommand] = []
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "test":
            parser.set_defaults({"verbose": False})  # the report's table says more
        if subcommand == "fit":
            parser.add_argument(
                "--resume",
                type=Resume,
                default="auto",
                help="Go on from the run's last checkpoint if there is one, or never, which needs an empty folder.",
            )
        return parser

    @override
    def _parse_ckpt_path(self) -> None:
        """Leave the options as the user typed them; the checkpoint's identity is compared when it is loaded."""

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        check_accelerator(str(config.trainer.accelerator))
        check_ranges(config.trainer)
        if config.data.tokenizer is None:
            config.data.tokenizer, config.data.revision = config.model.base, config.model.revision
        self.run_folder = RunFolder.of(config)
        self.newest: dict[str, Any] | None = None
        self.finished: str | None = None
        if self.subcommand == "fit":
            self._choose_start(config)
        else:
            self._choose_evaluated(config)

    def _choose_start(self, config: Namespace) -> None:
        asked = config.ckpt_path
        if config.trainer.fast_dev_run and asked is None:
            return
        newest = self.run_folder.newest(config.resume) if asked in (None, "last") else self._named(config)
        if newest is None:
            config.ckpt_path = None  # where there is no last one yet, as in a script
            rank_zero_info(f"{self.run_folder.path}: no checkpoint yet, starting at step 0")
            return
        path, checkpoint = newest
        self.newest = checkpoint if asked in (None, "last") else None
        config.ckpt_path = str(path)
        rank_zero_info(f"{path}: going on after step {checkpoint.get('global_step')}")

    def _named(self, config: Namespace) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint that ``--ckpt_path`` names, and its content."""
        if config.resume == "never":
            self.run_folder.newest("never")  # which refuses a used folder
        path = self.run_folder.checkpoint(config.ckpt_path)
        return None if path is None else (path, read_checkpoint(path))

    def _choose_evaluated(self, config: Namespace) -> None:
        path = self.run_folder.checkpoint(config.ckpt_path)
        config.ckpt_path = None if path is None else str(path)
        rank_zero_info(f"{path}: taken" if path else f"{self.run_folder.path}: no checkpoint, the base model answers")

    @override
    def instantiate_classes(self) -> None:
        with refused_by_name(self.config[self.subcommand].trainer.as_dict(), building=True):
            super().instantiate_classes()

    @override
    def after_instantiate_classes(self) -> None:
        check_launcher(self.trainer.strategy)
        check_averaging(self.trainer)
        if self.newest is not None:
            trainer: Any = self.trainer  # whose callbacks type checkers do not see
            left = nothing_left(self.newest, trainer.max_epochs, trainer.max_steps, trainer.callbacks)
            if left is not None:
                changed = changed_options(self.newest, self.model.hparams, self.datamodule.hparams)
                self.finished = self.run_folder.finished(left, changed)
            self.newest = None  # the Trainer reads it again, onto the device
        if self.finished is None:
            self.datamodule.validate_sources()
            self._check_general()
            self.model.check_base()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self._get(self.config_init, "trainer")
        # others see what the automatic ones decide
        callbacks = [PurgeOvertaken(), AutoBatchSize(), AutoCheckpointing(), *(config.callbacks or [])]
        logger: bool | Logger | list[Logger] = config.logger
        if logger is None:
            # what others measure is printed, and belongs to no step of the run
            logger = self.subcommand == "fit" and not config.barebones
        if logger is True and not config.barebones:
            logger = TensorBoardLogger(
                self.run_folder.path, name="", version="", sub_dir="tensorboard", default_hp_metric=False
            )
        evaluation: EvaluationReport = self._get(self.config_init, "evaluation")
        if evaluation.folder is None:
            evaluation.folder = self.run_folder.path
        self.writer = SingleWriter(self.run_folder.path)
        callbacks = [self.writer, *callbacks, *self._checkpoint(config), *self._monitor()]
        callbacks += [RunReport(self.run_folder.path), PredictionWriter(self.run_folder.predictions)]
        wants_bar = config.enable_progress_bar is not False and not config.barebones
        if wants_bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(RichProgressBar() if sys.stdout.isatty() else LineProgress())
        callbacks += [AgreedStop(), OutOfMemory(), RankFailure()]
        plugins = config.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, SafeCheckpointIO()]
        if config.barebones:
            kwargs |= without_extras(config)
        return super().instantiate_trainer(logger=logger, callbacks=callbacks, plugins=plugins, **kwargs)

    def _checkpoint(self, config: Namespace) -> list[pl.Callback]:
        """What writes the run's checkpoints, unless the Trainer is to write none."""
        checkpoint: RunCheckpoint = self._get(self.config_init, "checkpoint")
        if config.enable_checkpointing is not False and not config.barebones:
            checkpoint.dirpath = self.run_folder.checkpoints
            return [checkpoint]
        self.model.on_mismatch = checkpoint.on_mismatch
        if self.subcommand == "fit":
            option = "barebones: true" if config.barebones else "enable_checkpointing: false"
            rank_zero_info(f"trainer.{option}: no checkpoint is written, and what this run learns is lost at its end")
        return []

    def _monitor(self) -> list[pl.Callback]:
        """What shows the run as the section ``monitor`` asks for it."""
        monitor: Monitor = self._get(self.config_init, "monitor")
        options = self.datamodule.options
        self.general = ChatDataModule(
            val=monitor.general or str(GENERAL),
            tokenizer=options.tokenizer,
            revision=options.revision,
            chat_template=options.chat_template,
            max_length=options.max_length,
            truncation="truncate_end",
            batch_size=options.batch_size,
            num_workers=0,
            cache_dir=options.cache_dir,
        )
        row_length = options.max_length if options.packing else None
        return monitor.callbacks(self.general, row_length, from_predict=options.predict is not None)

    def _check_general(self) -> None:
        try:
            self.general.validate_sources()
        except DataError as error:
            raise DataError(f"monitor.general: {error}") from None

    def fit(self, **kwargs: Any) -> None:
        """Train, unless the run has nothing left to do."""
        if self.finished is not None:
            rank_zero_info(f"{self.run_folder.path}: nothing left to do: {self.finished}")
            return
        if not self._get(self.config_init, "trainer").fast_dev_run:
            self.writer.claim(self.trainer)
        self.trainer.fit(**kwargs)

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        section = self.config[subcommand].trainer.as_dict()
        with writing(self.run_folder.path), refused_by_name(section, building=False):
            super()._run_subcommand(subcommand)


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: The arguments; None: ``sys.argv``.
    """
    given = sys.argv[1:] if args is None else args
    try:
        check_platform()
        _quieten()
        if given and given[0] in COMMANDS:
            COMMANDS[given[0]].main(given[1:])
        else:
            Phi3CLI(args)
    except SIGTERMException:
        sys.exit(143)  # 128 + SIGTERM, as the shell has it
    except Exception as error:
        line = refusal(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(1)


def _quieten() -> None:
    """Leave out what upstream libraries say to their own developers, or for their own products."""
    warnings.filterwarnings("ignore", message="`isinstance\\(treespec, LeafSpec\\)` is deprecated")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
    warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback with a model")  # it shares it
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
    threading.excepthook = _thread_failed
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # one line for each 8-bit product
    if not sys.stderr.isatty():
        disable_progress_bar()  # of loading weights, which writes control characters into logs


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Leave out what TensorBoard's thread meets on a full disk, since its writer raises it again."""
    if remedy(failure.exc_value) is None:
        threading.__excepthook__(failure)
