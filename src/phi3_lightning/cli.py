"""The command line: LightningCLI over the two classes, with one folder a run."""

import difflib
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from phi3_lightning import preferences
from phi3_lightning.build import check_callbacks
from phi3_lightning.callbacks import Evaluation, Monitor, RunCheckpoint, SingleWriter
from phi3_lightning.callbacks.failure import is_communication
from phi3_lightning.checkpoint.averaging import check_averaging
from phi3_lightning.checkpoint.changed_options import changed_options
from phi3_lightning.checkpoint.io import read_checkpoint
from phi3_lightning.commands import chat, check, export, init, plan, preview
from phi3_lightning.commands.parser import Parser
from phi3_lightning.commands.quiet import quieten_libraries
from phi3_lightning.commands.run_trainer import general_chats, run_callbacks, run_logger, run_plugins
from phi3_lightning.commands.save_config import SaveRunConfig
from phi3_lightning.commands.trainer_options import check_monitors, check_ranges, refused_by_name, without_extras
from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.distributed.fsdp2 import check_launcher
from phi3_lightning.errors import DataError, ModelError, Phi3LightningError
from phi3_lightning.files import file_error, writing
from phi3_lightning.hardware import check_accelerator, check_platform, limit_threads, program
from phi3_lightning.hub import split_revision
from phi3_lightning.module import Phi3LoRAModule
from phi3_lightning.optim import check_optimizer
from phi3_lightning.run_folder import Resume, RunFolder, nothing_left

DESCRIPTION = "Fine-tune Phi-3 with LoRA on chat data, evaluate it, and let it answer."

COMMANDS = {"init": init, "preview": preview, "check": check, "plan": plan, "chat": chat, "export": export}
"""Commands besides the Trainer's; each module has a ``main`` and a ``DESCRIPTION``."""

ALL_COMMANDS = {
    "fit": "Train an adapter, or resume the run; validate, and keep the best checkpoint.",
    "validate": "Measure a checkpoint on the validation data.",
    "test": "Compare base and tuned model on held-out rows, in losses and answers.",
    "predict": "Write an answer to each prompt of a file.",
    **{name: command.DESCRIPTION for name, command in COMMANDS.items()},
}
"""One line for each command."""


class Phi3CLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` over a run folder."""

    def __init__(self, args: list[str] | None = None) -> None:
        first = (sys.argv[1:] if args is None else args)[:1]
        commands = set(self.subcommands())
        self._parsed = set(first) & commands or commands
        super().__init__(
            Phi3LoRAModule,
            ChatDataModule,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": True},
            trainer_defaults={"enable_model_summary": False},  # the table of adapted layers has more
            seed_everything_default=42,
            parser_class=Parser,
            parser_kwargs={
                "prog": program(),
                "description": DESCRIPTION,
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=str, default="phi3-lora", help="Name of the run: its folder is runs/NAME.")
        parser.add_class_arguments(RunCheckpoint, "checkpoint")
        parser.add_class_arguments(Evaluation, "evaluation")
        parser.add_class_arguments(Monitor, "monitor")

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand not in self._parsed:  # its options are not needed, and take a second to collect
            self._subcommand_method_arguments[subcommand] = []
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "test":
            parser.set_defaults({"verbose": False})  # the report's table has more
        if subcommand == "fit":
            parser.add_argument(
                "--resume",
                type=Resume,
                default="auto",
                help="Resume from the run's last checkpoint if there is one, or never, which needs an empty folder.",
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
            base = split_revision("model.base", config.model.base, config.model.revision, "model.revision")
            config.data.tokenizer, config.data.revision = base
        self.run_folder = RunFolder.of(config)
        self.newest: dict[str, Any] | None = None
        self.finished: str | None = None
        if self.subcommand == "fit":
            self._choose_start(config)
        else:
            self._choose_evaluated(config)

    def _choose_start(self, config: Namespace) -> None:
        word = config.ckpt_path
        if config.trainer.fast_dev_run and word is None:
            return
        start = self.run_folder.newest(config.resume) if word in (None, "last") else self._named(config)
        if start is None:
            config.ckpt_path = None  # in place of `last`, of which there is none yet
            rank_zero_info(f"{self.run_folder.path}: no checkpoint yet, starting at step 0")
            return
        path, checkpoint = start
        self.newest = checkpoint if word in (None, "last") else None
        config.ckpt_path = str(path)
        rank_zero_info(f"{path}: resuming after step {checkpoint.get('global_step')}")

    def _named(self, config: Namespace) -> tuple[Path, dict[str, Any]] | None:
        """Path and content of the checkpoint that ``--ckpt_path`` names."""
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
        check_callbacks(self.trainer)
        trainer: Any = self.trainer  # whose callbacks type checkers do not see
        if self.newest is not None:
            reason = nothing_left(self.newest, trainer.max_epochs, trainer.max_steps, trainer.callbacks)
            changes = changed_options(self.newest, self.model.hparams, self.datamodule.hparams)
            if reason is not None:
                self.finished = self.run_folder.finished(reason, changes)
            elif self.datamodule.options.max_tokens_per_batch is None and not self.datamodule.options.streaming:
                self.run_folder.check_order(self.newest, changes)
            self.newest = None  # the Trainer reads it again, onto the device
        if self.finished is None:
            self.datamodule.validate_sources()
            if self.subcommand != "predict":
                preferences.check_data(self.model.objective, self.datamodule)
            if self.subcommand == "fit":
                check_monitors(trainer.callbacks, self.model.objective)
                self.answers.check_monitors(trainer.callbacks)
                check_optimizer(self.model.optimizer_config)
            try:
                self.general.validate_sources()
            except DataError as error:
                raise DataError(f"monitor.general: {error}") from None
            self.model.check_base(restored=self.config[self.subcommand].ckpt_path is not None)
            if self.trainer.strategy.root_device.type == "cpu":
                limit_threads(self.model.spec().config.hidden_size)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        section, monitor = self._get(self.config_init, "trainer"), self._get(self.config_init, "monitor")
        evaluation: Evaluation = self._get(self.config_init, "evaluation")
        report, self.answers = evaluation.callbacks(self.run_folder.path)
        options = self.datamodule.options
        self.general = general_chats(monitor, options)
        self.writer = SingleWriter(self.run_folder.path)
        row_length = options.max_length if options.packing else None
        monitoring = monitor.callbacks(self.general, row_length, from_predict=options.predict is not None)
        return super().instantiate_trainer(
            logger=run_logger(section, self.run_folder, fit=self.subcommand == "fit"),
            callbacks=run_callbacks(
                section, self.run_folder, self.writer, *self._checkpoint(section), report, self.answers, *monitoring
            ),
            plugins=run_plugins(section),
            **kwargs | (without_extras(section) if section.barebones else {}),
        )

    def _checkpoint(self, section: Namespace) -> list[pl.Callback]:
        """The callback that writes the run's checkpoints, unless the Trainer is to write none."""
        checkpoint: RunCheckpoint = self._get(self.config_init, "checkpoint")
        if section.enable_checkpointing is not False and not section.barebones:
            checkpoint.dirpath = self.run_folder.checkpoints
            return [checkpoint]
        self.model.on_mismatch = checkpoint.on_mismatch
        if self.subcommand == "fit":
            option = "barebones: true" if section.barebones else "enable_checkpointing: false"
            rank_zero_info(f"trainer.{option}: no checkpoint is written, and what this run learns is lost at its end")
        return []

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
    """Run the command line with these arguments; None: ``sys.argv``."""
    words = sys.argv[1:] if args is None else args
    try:
        check_platform()
        quieten_libraries()
        if not words or words[0] in ("-h", "--help"):
            print(_help())
        elif words[0] not in ALL_COMMANDS and not words[0].startswith("-"):
            near = difflib.get_close_matches(words[0], ALL_COMMANDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            print(f"{_help()}\n\nerror: there is no command {words[0]!r}{hint}", file=sys.stderr)
            sys.exit(2)
        elif words[0] in COMMANDS:
            COMMANDS[words[0]].main(words[1:])
        else:
            Phi3CLI(args)
    except SIGTERMException:
        sys.exit(143)  # 128 + SIGTERM, as the shell has it
    except Exception as error:
        line = _refusal(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(1)


def _help() -> str:
    """Return a table of all commands."""
    width = max(map(len, ALL_COMMANDS))
    commands = [f"  {name:<{width}}  {line}" for name, line in ALL_COMMANDS.items()]
    usage = f"usage: {program()} COMMAND [--config FILE] [--OPTION VALUE ...]"
    last = f"{program()} COMMAND --help explains every option of a command."
    return "\n".join([usage, "", DESCRIPTION, "", *commands, "", last])


def _refusal(error: Exception) -> str | None:
    """What is wrong, where, and what to do; None for a fault of the program, which keeps its traceback."""
    earlier = error.__context__
    if isinstance(error, ModelError) and isinstance(earlier, Exception) and not error.__suppress_context__:
        return _refusal(earlier)  # a callback that saves on exceptions had nothing to save
    if isinstance(error, Phi3LightningError):
        return "\n".join([str(error), *getattr(error, "__notes__", [])])
    if is_communication(error) and hasattr(error, "__notes__"):
        return "\n".join(error.__notes__)  # which the callback RankFailure adds
    if isinstance(error, MisconfigurationException):
        return " ".join(str(error).split())
    return file_error(error) if isinstance(error, OSError) else None
