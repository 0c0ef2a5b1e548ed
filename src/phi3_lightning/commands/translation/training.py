"""What each key of TrainingArguments and SFTConfig comes to here."""

from pathlib import PurePath
from typing import Any, Final

from phi3_lightning.commands.translation.rules import SAME, Equal, Given, Rule, alone, as_it_is, unless, whole

SCHEDULES: Final = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
OPTIMIZERS: Final = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw"), "adamw"),
    **dict.fromkeys(("paged_adamw_8bit", "adamw_bnb_8bit", "adamw_8bit"), "paged_adamw_8bit"),
}


def _schedule(value: Any) -> Any:
    name = str(value).rpartition(".")[2].lower()
    return SCHEDULES.get(name, Equal(note=f"{name} is not offered, cosine is taken; linear and constant are there"))


def _bf16(value: Any, given: Given) -> Any:
    if value or given.get("fp16"):
        return Equal({"trainer.precision": "bf16-mixed", "model.dtype": "bfloat16"}) if value else SAME
    return Equal({"trainer.precision": "32-true", "model.dtype": "float32"})


def _fp16(value: Any) -> Equal:
    return Equal({"trainer.precision": "16-mixed", "model.dtype": "float16"}) if value else SAME


def _max_steps(value: Any) -> Equal:
    steps = whole(value)
    return Equal({"trainer.max_steps": steps, "trainer.max_epochs": -1}) if steps > 0 else SAME


def _epochs(value: Any, given: Given) -> Any:
    if _ends_by_steps(given):
        return Equal(note="max_steps ends the run, there as here")
    if float(value) != int(float(value)):
        return Equal(note=f"epochs are whole here: for {value} give trainer.max_steps, or trainer.limit_train_batches")
    return int(float(value))


def _ends_by_steps(given: Given) -> bool:
    steps = given.get("max_steps")
    return isinstance(steps, int) and steps > 0


def _warmup_ratio(value: Any, given: Given) -> Any:
    return Equal(note="warmup_steps wins, there as here") if given.get("warmup_steps") else float(value)


def _warmup_steps(value: Any, given: Given) -> Any:
    if not value and given.get("warmup_ratio"):
        return SAME
    return float(value) if 0 < float(value) < 1 else whole(value)


def _checkpointing(value: Any) -> str:
    return "full" if value else "none"


def _checkpointing_options(value: Any) -> Equal:
    if dict(value) in ({}, {"use_reentrant": False}):
        return SAME
    return Equal(note="the variant that is not reentrant is used: the other gives no gradient to adapters")


def _optim(value: Any) -> Any:
    name = str(value).rpartition(".")[2]
    if name in ("paged_adamw", "paged_adamw_32bit"):
        settings = {"model.optimizer.name": "adamw"}
        return Equal(settings, "adamw: an adapter's states are small, and paging them saves nothing")
    return OPTIMIZERS.get(name, Equal(note=f"{name} is not offered, and adamw is taken; paged_adamw_8bit is there too"))


def _betas(_value: Any, given: Given) -> list[float]:
    return [float(given.get("adam_beta1", 0.9)), float(given.get("adam_beta2", 0.999))]


def _clip(value: Any) -> float | None:
    return float(value) or None


def _every(value: Any) -> Any:
    if 0 < float(value) < 1:
        return Equal(note=f"{value} is a share of the run there: give a number of steps")
    return whole(value)


def _evaluation(value: Any, given: Given) -> Equal:
    kind = str(value).rpartition(".")[2].lower()
    if kind == "no":
        return Equal({"data.val_fraction": 0.0, "checkpoint.monitor": None})
    every = given.get("eval_steps") or given.get("logging_steps")
    if kind == "epoch" or not isinstance(every, int):
        note = None if kind == "epoch" else "without whole eval_steps each epoch validates"
        return Equal(note=note)
    window = given.get("gradient_accumulation_steps", 1)
    interval = every * (window if isinstance(window, int) else 1)  # Lightning counts batches here
    return Equal({"trainer.val_check_interval": interval, "trainer.check_val_every_n_epoch": None})


def _eval_steps(_value: Any, given: Given) -> Equal:
    strategy = given.get("eval_strategy", given.get("evaluation_strategy"))
    return SAME if str(strategy).endswith("steps") else Equal(note="it counts with eval_strategy: steps alone")


def _do_eval(value: Any) -> Equal:
    return SAME if value else Equal(note="each epoch validates where there are data: data.val_fraction: 0 for none")


def _eval_batch(value: Any, given: Given) -> Equal:
    if value == given.get("per_device_train_batch_size", 8):
        return SAME
    return Equal(note="validation has rows of data.batch_size as well; the result does not depend on it")


def _save_strategy(value: Any) -> Equal:
    if str(value).rpartition(".")[2].lower() == "no":
        return Equal(note="last.ckpt is always written, adapter-sized; --trainer.fast_dev_run true writes nothing")
    return SAME  # at the end of each epoch anyway, the best anyway, and save_steps has its rule


def _save_steps(value: Any, given: Given) -> Any:
    strategy = str(given.get("save_strategy", "steps")).rpartition(".")[2].lower()
    return _every(value) if strategy == "steps" else Equal(note="it counts with save_strategy: steps alone")


def _output_dir(value: Any) -> Equal:
    path = PurePath(str(value))
    if path.name in ("", ".."):
        return Equal(note="no name for a run; its folder is runs/NAME: give run")
    root = {} if path.parent == PurePath() else {"trainer.default_root_dir": str(path.parent)}
    return Equal({"run": path.name, **root}, f"everything of the run is in {path.parent / 'runs' / path.name}")


def _run_name(value: Any, given: Given) -> Any:
    return Equal(note="the run is called after output_dir") if given.get("output_dir") else str(value).replace("/", "-")


def _report_to(value: Any) -> Any:
    names = [value] if isinstance(value, str) else list(value)
    if names in ([], ["none"]):
        return False
    others = [name for name in names if name not in ("tensorboard", "all")]
    note = f"TensorBoard is written; {', '.join(others)}: another logger goes under trainer.logger, by class_path"
    return Equal(note=note) if others else SAME


def _best(value: Any) -> Any:
    if value in ("loss", "eval_loss"):
        return "val/loss"
    return Equal(note=f"{value!r} is no metric here; val/loss decides, or what checkpoint.monitor names")


def _packing_strategy(value: Any) -> Any:
    if value == "bfd_split":
        return "split"
    return SAME if value == "bfd" else Equal(note="chats are never cut to fill a row, and rows are filled best-fit")


def _answers_alone(value: Any) -> Any:
    return "assistant" if value else Equal(note="the assistant's answers alone are trained; data.train_on: all for all")


def _loss(value: Any) -> Equal:
    plain = value in ("nll", "chunked_nll")
    return SAME if plain else Equal(note="override Phi3LoRAModule.compute_loss for another loss")


def _sampling(value: Any) -> Equal:
    if value in ("random", "group_by_length", True, False):
        return SAME  # batches are of like length, and each epoch permutes them
    return Equal(note="batches are made once, of like length, and each epoch permutes them")


RULES: Final[dict[str, Rule]] = {
    "activation_checkpointing": alone("model.gradient_checkpointing", _checkpointing),
    "activation_checkpointing_kwargs": alone("model.gradient_checkpointing", _checkpointing_options),
    "adam_beta1": Rule("model.optimizer.betas", _betas),
    "adam_beta2": Rule("model.optimizer.betas", _betas),
    "adam_epsilon": alone("model.optimizer.eps", float),
    "assistant_only_loss": alone("data.train_on", _answers_alone),
    "auto_find_batch_size": alone("data.max_tokens_per_batch", lambda value: "auto" if value else SAME),
    "bf16": Rule("trainer.precision", _bf16),
    "chat_template_path": alone("data.chat_template", as_it_is),
    "completion_only_loss": alone("data.train_on", _answers_alone),
    "data_seed": alone("data.seed", whole),
    "dataloader_num_workers": alone("data.num_workers", whole),
    "dataset_num_proc": alone("data.num_proc", whole),
    "do_eval": alone("data.val_fraction", _do_eval),
    "eval_steps": Rule("trainer.val_check_interval", _eval_steps),
    "eval_strategy": Rule("trainer.val_check_interval", _evaluation),
    "evaluation_strategy": Rule("trainer.val_check_interval", _evaluation),
    "fp16": alone("trainer.precision", _fp16),
    "gradient_accumulation_steps": alone("trainer.accumulate_grad_batches", whole),
    "gradient_checkpointing": alone("model.gradient_checkpointing", _checkpointing),
    "gradient_checkpointing_kwargs": alone("model.gradient_checkpointing", _checkpointing_options),
    "greater_is_better": unless(False, "lower is better: of checkpoint.monitor, the lowest value is kept"),
    "group_by_length": alone("data.packing", _sampling),
    "label_smoothing_factor": unless(0, "override Phi3LoRAModule.compute_loss for another loss"),
    "learning_rate": alone("model.optimizer.lr", float),
    "logging_steps": alone("trainer.log_every_n_steps", _every),
    "logging_strategy": unless("steps", "trainer.log_every_n_steps says how often; trainer.logger: false for never"),
    "loss_type": alone("", _loss),
    "lr_scheduler_type": alone("model.schedule.name", _schedule),
    "max_grad_norm": alone("trainer.gradient_clip_val", _clip),
    "max_length": alone("data.max_length", whole),
    "max_seq_length": alone("data.max_length", whole),
    "max_steps": alone("trainer.max_steps", _max_steps),
    "metric_for_best_model": alone("checkpoint.monitor", _best),
    "neftune_noise_alpha": alone("model.neftune_noise_alpha", float),
    "no_cuda": alone("trainer.accelerator", lambda value: "cpu" if value else SAME),
    "num_train_epochs": Rule("trainer.max_epochs", _epochs),
    "optim": alone("model.optimizer.name", _optim),
    "output_dir": alone("run", _output_dir),
    "packing": alone("data.packing", lambda value: bool(value)),
    "packing_strategy": alone("data.overlong", _packing_strategy),
    "per_device_eval_batch_size": Rule("data.batch_size", _eval_batch),
    "per_device_train_batch_size": alone("data.batch_size", whole),
    "report_to": alone("trainer.logger", _report_to),
    "resume_from_checkpoint": unless(True, "the same command goes on; --ckpt_path names another checkpoint"),
    "run_name": Rule("run", _run_name),
    "save_steps": Rule("checkpoint.every_n_steps", _save_steps),
    "save_strategy": alone("checkpoint.every_n_steps", _save_strategy),
    "seed": alone("seed_everything", whole),
    "train_sampling_strategy": alone("data.packing", _sampling),
    "use_cpu": alone("trainer.accelerator", lambda value: "cpu" if value else SAME),
    "use_liger_kernel": unless(False, "not used; the head is computed on supervised positions alone"),
    "warmup_ratio": Rule("model.schedule.warmup", _warmup_ratio),
    "warmup_steps": Rule("model.schedule.warmup", _warmup_steps),
    "weight_decay": alone("model.optimizer.weight_decay", float),
}  # fmt: skip
"""Keys that have an equal."""
