"""``plan``: predicts memory and time of a run, and suggests changes, from its configuration alone."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from huggingface_hub import try_to_load_from_cache
from jsonargparse import Namespace
from jsonargparse.typing import restricted_string_type
from rich.console import Console

from phi3_lightning.callbacks import Evaluation
from phi3_lightning.commands.measure import Measurement, measure
from phi3_lightning.commands.parser import Parser, command_parser, prepare
from phi3_lightning.commands.plan_tables import (
    answers_line,
    measured_table,
    memory_table,
    run_line,
    suggestion_table,
    verdict,
)
from phi3_lightning.commands.planned_answers import PlannedAnswers, planned_answers
from phi3_lightning.commands.planned_rows import PlannedRows, planned_rows
from phi3_lightning.commands.quiet import quieten_trainers
from phi3_lightning.commands.single_device import device_list, single_device_trainer
from phi3_lightning.config import Schedule
from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.distributed.fsdp2 import check_shardable
from phi3_lightning.errors import ConfigError, ModelError
from phi3_lightning.hardware import check_accelerator, device_memory, peak_flops, resident_memory
from phi3_lightning.hub import refusal
from phi3_lightning.model.activation_checkpointing import CheckpointingMode
from phi3_lightning.module import Phi3LoRAModule
from phi3_lightning.planning.auto import PLANNED_SHARE_OF_MEMORY, fastest_mode, rows_that_fit, share_step
from phi3_lightning.planning.length import run_length
from phi3_lightning.planning.memory import Memory, MemoryPredictor
from phi3_lightning.planning.published_configs import PUBLISHED, write_config
from phi3_lightning.planning.spec import RunSpec
from phi3_lightning.planning.speed import least_seconds, timed_seconds
from phi3_lightning.planning.step import BatchShape
from phi3_lightning.planning.suggestions import Suggestion, suggestions
from phi3_lightning.progress import phase_progress

DESCRIPTION = "Predict memory, speed and hours of a run from its configuration, and what would help most."


def parser() -> Parser:
    """Return the parser of ``plan``, which takes the configuration of ``fit`` as it is."""
    classes = {"model": Phi3LoRAModule, "data": ChatDataModule, "trainer": pl.Trainer}
    result = command_parser("plan", DESCRIPTION, classes, {})
    result.add_class_arguments(Evaluation, "evaluation")
    result.add_argument(
        "--measure", action="store_true", help="Load the base, take three steps, and set them beside the prediction."
    )
    result.add_argument(
        "--memory",
        type=restricted_string_type("Gigabytes", r"^\d+(\.\d+)?\s*(GB)?$") | None,
        default=None,
        help="Memory of the device, such as 16GB, in 10^9 bytes. null: that of this machine's device.",
    )
    result.accept_rest_of_run()
    return result


def main(args: list[str]) -> None:
    """Run the command with the arguments after ``plan``."""
    config = parser().parse_args(args)
    prepare(config)
    quieten_trainers()
    with phase_progress("planning") as (on_begin, _):
        Plan(config, on_begin).print(Console(highlight=False))


class Plan:
    """The plan of one configuration; ``on_begin`` gets the name of each stage.

    Raises:
        ModelError: If the base has no configuration, cannot carry the adapter, or, to be measured, has no weights.
    """

    def __init__(self, config: Namespace, on_begin: Callable[[str], None]) -> None:
        self.config = config
        self.on_begin = on_begin
        self.on_gpu = _on_gpu(str(config.trainer.accelerator))
        self.model_options = self._readable_base(config.model.as_dict())
        strategy = config.trainer.strategy
        module = Phi3LoRAModule(**self.model_options)
        self.objective, self.generation = module.objective, module.generation
        _, self.validation = Evaluation(**config.evaluation.as_dict()).callbacks(Path())
        spec = replace(
            module.spec(),
            mixed=str(config.trainer.precision) in ("16-mixed", "bf16-mixed", "16", "bf16"),
            ranks=_ranks(config.trainer, self.on_gpu),
            sharded=isinstance(strategy, Namespace) and str(strategy.class_path).endswith("FSDP2Strategy"),
            process=None if self.on_gpu else resident_memory(),
        )
        if spec.sharded:
            check_shardable(False, spec.quantization, spec.lora, spec.optimizer, spec.objective)
        on_begin("measuring the device")
        dtype = torch.float32 if spec.dtype == "float32" else torch.bfloat16
        self.peak = None if self._device is None else peak_flops(self._device, dtype)
        on_begin("reading the data")
        options = config.data.as_dict()
        if config.data.max_tokens_per_batch == "auto":
            options |= {"batch_size": self._rows_that_fit(spec, options), "max_tokens_per_batch": None}
        self.rows: PlannedRows = planned_rows(ChatDataModule(**options), self.objective)
        self.predictor, self.choice = self._with_mode(MemoryPredictor(spec))
        self.spec = self.predictor.spec

    def _readable_base(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of the module, with the published shapes of a base that is not on this machine."""
        module = Phi3LoRAModule(**options)
        published = module.base in PUBLISHED
        if published and module.revision is None and not self.config.measure and not _is_here(module.base):
            return self._published_base(options, module.base)
        try:
            module.check_base()
        except ModelError as error:
            unknown = module.revision is not None and refusal(error, module.base, module.revision)
            if published and isinstance(error.__cause__, OSError) and not unknown:
                return self._published_base(options, module.base)
            if not Path(module.base).is_dir():
                error.add_note("plan reads config.json alone: --model.base FOLDER with that file needs no network")
            raise
        return options

    def _published_base(self, options: dict[str, Any], base: str) -> dict[str, Any]:
        self.on_begin(f"{base} is not on this machine; the shapes that it was published with are taken")
        self._shapes = tempfile.TemporaryDirectory(prefix="phi3-lightning-plan-")
        write_config(base, Path(self._shapes.name))
        return options | {"base": self._shapes.name, "base_id": base}

    @property
    def _device(self) -> torch.device | None:
        """The device of the run; None: a GPU that is not here."""
        if not self.on_gpu:
            return torch.device("cpu")
        return torch.device("cuda", 0) if torch.cuda.is_available() else None

    def _rows_that_fit(self, spec: RunSpec, options: dict[str, Any]) -> int:
        if self._device is None:
            raise ConfigError("data.max_tokens_per_batch: auto needs the GPU, and there is none here; give a number")
        data = ChatDataModule(**options | {"max_tokens_per_batch": None})
        row = BatchShape.of(planned_rows(data, self.objective).largest_row)
        rows, _ = rows_that_fit(spec, row, PLANNED_SHARE_OF_MEMORY * device_memory(self._device)[1])
        trainer = self.config.trainer
        trainer.accumulate_grad_batches, rows = share_step(
            options["batch_size"] * trainer.accumulate_grad_batches, rows
        )
        return rows

    def _with_mode(self, predictor: MemoryPredictor) -> tuple[MemoryPredictor, str | None]:
        """The run with a checkpointing mode, and the reason where that was ``auto``."""
        if predictor.spec.gradient_checkpointing != "auto":
            return predictor, None
        mode: CheckpointingMode | int = "full"
        why = "there is no GPU here; where more fits, fit recomputes less"
        if self._device is not None:
            self.on_begin("choosing a checkpointing mode")
            free, _ = device_memory(self._device)
            room = PLANNED_SHARE_OF_MEMORY * (free - predictor.memory(self.rows.shape).base)
            mode, why = fastest_mode(predictor, self.rows.shape, room)
        return predictor.with_mode(mode), f"model.gradient_checkpointing: auto is {mode} here: {why}"

    def _seconds(self, shape: BatchShape) -> float | None:
        """Seconds of a micro-batch on this machine's device; None where a few layers do not predict them."""
        if self._device is None or not self.predictor.fake.alike:
            return None
        self.on_begin("timing some layers")
        return timed_seconds(self.spec, shape, device=self._device.type, peak=self.peak)

    def _answers(self, shape: BatchShape) -> PlannedAnswers | None:
        """What answers in validation take; None without any, or where the device is not here."""
        if self._device is None or self.validation.val_rows == 0:
            return None
        self.on_begin("timing answers")
        return planned_answers(self.validation, self.spec, shape, self.generation, self._device.type)

    def _measure(self) -> Measurement | None:
        if not self.config.measure:
            return None
        self.on_begin("three real steps")
        section = self.config.trainer.as_dict()
        with tempfile.TemporaryDirectory(prefix="phi3-lightning-plan-") as folder:
            make_trainer = partial(
                single_device_trainer, section, folder, gradient_clip_val=section["gradient_clip_val"]
            )
            changes = {"gradient_checkpointing": self.spec.mode, "schedule": Schedule("constant", 0)}
            return measure(Phi3LoRAModule(**self.model_options | changes), self.rows.largest, make_trainer)

    def print(self, console: Console) -> None:
        """Print the plan."""
        shape = self.rows.shape
        measurement = self._measure()  # first: what follows takes memory too
        self.on_begin("a step without values")
        memory = self.predictor.memory(shape)
        helpful = suggestions(self.predictor, shape, memory, lambda change: self.on_begin(f"with {change}"))
        seconds, answers = self._seconds(shape), self._answers(shape)
        console.print(f"micro-batch: {self._describe_batch()}", soft_wrap=True, markup=False)
        if self.objective.name == "kto":
            console.print(self._describe_baseline(), soft_wrap=True, markup=False)
        if self.choice is not None:
            console.print(self.choice, soft_wrap=True, markup=False)
        console.print(memory_table(memory, "a GPU" if self.on_gpu else "this process"))
        if self.on_gpu or self.spec.sharded or self.spec.quantization is not None:
            console.print("a calculation: few GPUs, no FSDP2 and no quantised base were measured (docs/plan.md)")
        console.print(suggestion_table(helpful, memory))
        self._print_speed(console, seconds)
        if measurement is not None:
            console.print(measured_table(memory, measurement, shape, seconds, on_gpu=self.on_gpu))
            seconds = measurement.seconds
        if answers is not None:
            console.print(answers_line(answers), soft_wrap=True)
        self._print_length(console, None if seconds is None else self.spec.ranks * shape.tokens / seconds, answers)
        console.print(self._verdict(memory, helpful), soft_wrap=True)

    def _verdict(self, memory: Memory, helpful: list[Suggestion]) -> str:
        if self.config.memory is not None:
            return verdict(memory, 1e9 * float(self.config.memory.removesuffix("GB")), helpful)
        if self._device is None:
            return "whether it fits is unknown: there is no GPU here; give its size, such as --memory 16GB"
        return verdict(memory, device_memory(self._device)[1], helpful)

    def _describe_batch(self) -> str:
        shape = self.rows.shape
        documents = sum(map(len, shape.lengths))
        size = f"{shape.tokens:,} tokens, {documents:,} documents"
        if shape.shared is not None:
            once = shape.tokens - shape.computed_tokens(self.spec)
            size = f"{shape.tokens:,} tokens, {once:,} of them computed once for two answers, {documents // 2:,} pairs"
        rows = f"{size}, {len(shape.lengths):,} rows ({self.rows.source})"
        return f"{rows}, {self.config.trainer.accumulate_grad_batches} to an optimiser step"

    def _describe_baseline(self) -> str:
        line = "kto: its baseline is a mean over the answers of a micro-batch, so that a change of data.batch_size, "
        line += "data.max_tokens_per_batch or the devices changes what is learnt"
        if self.rows.single:
            line += f"; {self.rows.single:,} micro-batches hold one answer, which is then its own baseline"
        return line

    def _print_speed(self, console: Console, seconds: float | None) -> None:
        if seconds is None:
            why = "there is no GPU here" if self._device is None else "layers carry different adapters; use --measure"
            console.print(f"speed: unknown: {why}")
            return
        tokens = self.rows.shape.tokens
        line = f"speed: {tokens / seconds:,.0f} tokens/s a device, {1e3 * seconds / tokens:.3f} ms a token"
        if self.peak is not None:
            share = least_seconds(self.predictor.fake.model, self.spec, self.rows.shape, self.peak) / seconds
            line += f"; its products with weights alone take {share:.0%} of it, at {self.peak / 1e12:.3g} TFLOP/s"
        console.print(line, soft_wrap=True)

    def _print_length(self, console: Console, tokens_per_second: float | None, answers: PlannedAnswers | None) -> None:
        if self.rows.batches is None:
            console.print("whole run: unknown, since the data were not read")
            return
        trainer, interval = self.config.trainer, self.config.trainer.val_check_interval
        counted = interval is None or isinstance(interval, int | float)  # else by the clock
        length = run_length(
            self.rows.batches,
            self.rows.tokens,
            self.spec.ranks,
            accumulate=trainer.accumulate_grad_batches,
            max_epochs=trainer.max_epochs,
            max_steps=trainer.max_steps,
            limit=trainer.limit_train_batches,
            check_val_every_n_epoch=trainer.check_val_every_n_epoch,
            val_check_interval=interval if counted else None,
        )
        console.print(run_line(length, tokens_per_second, answers if counted else None), soft_wrap=True)


def _is_here(base: str) -> bool:
    """Whether the configuration of a base is in a folder or in the hub's cache."""
    return Path(base).is_dir() or isinstance(try_to_load_from_cache(base, "config.json"), str)


def _on_gpu(accelerator: str) -> bool:
    check_accelerator(accelerator)
    return accelerator != "cpu" and (accelerator != "auto" or torch.cuda.is_available())


def _ranks(trainer: Namespace, on_gpu: bool) -> int:
    devices = device_list(trainer.devices)
    if devices is not None:
        here = len(devices)
    elif str(trainer.devices) in ("auto", "-1"):
        here = max(torch.cuda.device_count(), 1) if on_gpu else 1
    else:
        here = int(trainer.devices)
    return here * int(trainer.num_nodes)
