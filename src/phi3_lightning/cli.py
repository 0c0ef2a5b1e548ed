"""The command line: LightningCLI over the two classes, with one folder a run."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from transformers.utils.logging import disable_progress_bar
from typing_extensions import override

from phi3_lightning.callbacks import (
    AgreedStop,
    EvaluationReport,
    LineProgress,
    Monitor,
    OutOfMemory,
    PredictionWriter,
    RankFailure,
    RunCheckpoint,
    RunReport,
    StartUp,
)
from phi3_lightning.callbacks.board import boards, step_of
from phi3_lightning.callbacks.failure import is_communication
from phi3_lightning.callbacks.monitor import GENERAL
from phi3_lightning.checkpoint_io import SafeCheckpointIO, read_checkpoint
from phi3_lightning.commands import chat, check, export, init, plan, preview
from phi3_lightning.commands.parser import Parser
from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.errors import DataError, Phi3LightningError
from phi3_lightning.module import Phi3LoRAModule
from phi3_lightning.platform import check_accelerator, check_platform
from phi3_lightning.run_folder import Resume, RunFolder, nothing_left

DESCRIPTION = "Fine-tune Phi-3 with LoRA on chat data, evaluate it, and let it answer."

COMMANDS = {"init": init, "preview": preview, "check": check, "plan": plan, "chat": chat, "export": export}
"""Commands that are not the Trainer's; each module has a ``main`` and a ``DESCRIPTION``."""


class SaveRunConfig(SaveConfigCallback):
    """Keeps what the user asked for in the run's folder, once the run has really begun."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            config = self.config.clone()
            for key in ("ckpt_path", "resume", "weights_only"):  # of one call, not of the run
                config.pop(key, None)
            text = self.parser.dump(config, skip_none=False, skip_validation=True)
            RunFolder.named(config.run, config.trainer.default_root_dir).keep_config(text)
            for writer in boards(trainer):
                writer.add_text("config", f"```yaml\n{text}\n```", step_of(trainer))


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
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
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
        if config.data.tokenizer is None:
            config.data.tokenizer, config.data.revision = config.model.base, config.model.revision
        self.run_folder = RunFolder.named(config.run, config.trainer.default_root_dir)
        self.finished: str | None = None
        if config.trainer.fast_dev_run:
            return
        if self.subcommand == "fit":
            self._choose_start(config)
        else:
            self._choose_evaluated(config)

    def _choose_start(self, config: Namespace) -> None:
        if config.ckpt_path is not None:
            read_checkpoint(Path(config.ckpt_path))
            return
        newest = self.run_folder.newest(config.resume)
        if newest is None:
            rank_zero_info(f"{self.run_folder.path}: no checkpoint yet, starting at step 0")
            return
        path, checkpoint = newest
        self.finished = nothing_left(checkpoint, config.trainer.max_epochs, config.trainer.max_steps)
        config.ckpt_path = str(path)
        rank_zero_info(f"{path}: going on after step {checkpoint['global_step']}")

    def _choose_evaluated(self, config: Namespace) -> None:
        if config.ckpt_path is None:
            path = self.run_folder.evaluated()
            config.ckpt_path = None if path is None else str(path)
            rank_zero_info(
                f"{path}: taken" if path else f"{self.run_folder.path}: no checkpoint, the base model answers"
            )

    @override
    def after_instantiate_classes(self) -> None:
        if self.finished is None:
            self.datamodule.validate_sources()
            self._check_general()
            self.model.check_base()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self._get(self.config_init, "trainer")
        callbacks = list(config.callbacks or [])
        logger: bool | Logger | list[Logger] = config.logger
        if logger is None or logger is True:
            logger = TensorBoardLogger(
                self.run_folder.path, name="", version="", sub_dir="tensorboard", default_hp_metric=False
            )
        checkpoint: RunCheckpoint = self._get(self.config_init, "checkpoint")
        if checkpoint.dirpath is None:
            checkpoint.dirpath = self.run_folder.checkpoints
        evaluation: EvaluationReport = self._get(self.config_init, "evaluation")
        if evaluation.folder is None:
            evaluation.folder = self.run_folder.path
        callbacks += [*self._monitor(), RunReport(self.run_folder.path), PredictionWriter(self.run_folder.predictions)]
        if config.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(RichProgressBar() if sys.stdout.isatty() else LineProgress())
        callbacks += [AgreedStop(), OutOfMemory(), RankFailure(), StartUp()]
        plugins = config.plugins or []
        plugins = [*(plugins if isinstance(plugins, list) else [plugins]), SafeCheckpointIO()]
        return super().instantiate_trainer(logger=logger, callbacks=callbacks, plugins=plugins, **kwargs)

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
            overlong="truncate_end",
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
        self.trainer.fit(**kwargs)


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
    except Phi3LightningError as error:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", []))
        print(f"error: {error}{notes}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if not is_communication(error) or not hasattr(error, "__notes__"):
            raise
        print("error: " + "\n".join(error.__notes__), file=sys.stderr)  # what the callback RankFailure found out
        sys.exit(1)


def _quieten() -> None:
    """Leave out what upstream libraries say to their own developers, or for their own products."""
    warnings.filterwarnings("ignore", message="`isinstance\\(treespec, LeafSpec\\)` is deprecated")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # one line for each 8-bit product
    if not sys.stderr.isatty():
        disable_progress_bar()  # of loading weights, which writes control characters into logs
