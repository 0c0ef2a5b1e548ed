"""What the arguments of TRL, PEFT, transformers and datasets are called here."""

import math
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, Final

Entry = tuple[str, Callable[[Any], Any] | Mapping[Any, Any]] | str
"""The option that an argument is, and what its value becomes: by a function that raises a ValueError, or by a mapping
in which None is what holds here anyway. Or what to do, as text, where there is no such option."""


def _number(value: Any) -> int | float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError("it is no number")
    return value


def _whole(value: Any) -> int:
    if _number(value) != int(value):
        raise ValueError("it is no whole number")
    return int(value)


def _count(value: Any) -> int:
    if _whole(value) < 1:
        raise ValueError("it is not above 0")
    return int(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("it is no text")
    return value


def _folder(value: Any) -> str:
    if PurePath(_text(value)).name in ("", ".."):
        raise ValueError("it gives the run no name")
    return str(PurePath(value))


_EVALUATION: Final = ("trainer.check_val_every_n_epoch", {way: way for way in ("no", "epoch", "steps")})
_ANSWERS: Final = ("data.train_on", {True: "assistant"})
_CHECKPOINTS: Final = "last.ckpt and best.ckpt are kept, and the best is evaluated and exported"
_ROWS: Final = "data.train takes chats as they are, and the tokenizer's template is applied here"
_HUB: Final = "nothing is uploaded while training: export, then `hf upload OWNER/NAME FOLDER`"
_SHARDED: Final = "for a base that is too large for one GPU: --config configs/overlays/fsdp2.yaml"
_RESUMED: Final = "the same command goes on with its run, and another --run starts a new one"

TRAINING: Final[dict[str, Entry]] = {
    "run_name": "the run is called after output_dir; --run calls it otherwise",
    **dict.fromkeys(("output_dir", "argument 1"), ("run", _folder)),
    "num_train_epochs": ("trainer.max_epochs", _count),
    "max_steps": ("trainer.max_steps", _whole),
    "per_device_train_batch_size": ("data.batch_size", _count),
    "per_device_eval_batch_size": "validation has rows of data.batch_size, and the same result with any",
    "gradient_accumulation_steps": ("trainer.accumulate_grad_batches", _count),
    "auto_find_batch_size": ("data.max_tokens_per_batch", {True: "auto", False: None}),
    "learning_rate": ("model.optimizer.lr", _number),
    "weight_decay": ("model.optimizer.weight_decay", _number),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), "model.optimizer.betas has both"),
    "adam_epsilon": ("model.optimizer.eps", _number),
    "optim": (
        "model.optimizer.name",
        dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "paged_adamw_32bit"), "adamw")
        | dict.fromkeys(("paged_adamw_8bit", "adamw_8bit", "adamw_bnb_8bit"), "paged_adamw_8bit"),
    ),
    "lr_scheduler_type": (
        "model.schedule.name",
        {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"},
    ),
    "warmup_ratio": ("model.schedule.warmup", _number),
    "warmup_steps": ("model.schedule.warmup", _number),
    "max_grad_norm": ("trainer.gradient_clip_val", _number),
    "bf16": ("trainer.precision", {True: "bf16-mixed"}),
    "fp16": ("trainer.precision", {True: "16-mixed", False: None}),
    "gradient_checkpointing": ("model.gradient_checkpointing", {True: "full", False: "none"}),
    "gradient_checkpointing_kwargs": "checkpointing is never reentrant here, since adapters get no gradient then",
    "neftune_noise_alpha": ("model.neftune_noise_alpha", _number),
    "seed": ("seed_everything", _whole),
    "data_seed": ("data.seed", _whole),
    "use_cpu": ("trainer.accelerator", {True: "cpu", False: None}),
    "logging_steps": ("trainer.log_every_n_steps", _count),
    "logging_strategy": ("trainer.log_every_n_steps", {"steps": None}),
    "report_to": ("trainer.logger", {"none": False, "tensorboard": None}),
    "save_steps": ("checkpoint.every_n_steps", _count),
    "save_strategy": ("checkpoint.every_n_steps", {"steps": None, "epoch": None}),
    **dict.fromkeys(("save_total_limit", "load_best_model_at_end"), _CHECKPOINTS),
    "metric_for_best_model": ("checkpoint.monitor", {"loss": "val/loss", "eval_loss": "val/loss"}),
    "greater_is_better": ("checkpoint.monitor", {False: None}),
    "do_eval": ("data.val_fraction", {True: None}),
    "evaluation_strategy": _EVALUATION,
    "eval_strategy": _EVALUATION,
    "eval_steps": ("trainer.val_check_interval", _count),
    "group_by_length": ("data.packing", {True: None, False: None}),
    "dataloader_num_workers": ("data.num_workers", _whole),
    "dataset_num_proc": ("data.num_proc", _count),
    "max_length": ("data.max_length", _count),
    "max_seq_length": ("data.max_length", _count),
    "packing": ("data.packing", {True: True, False: False}),
    "packing_strategy": ("data.truncation", {"bfd": None, "bfd_split": "split"}),
    "assistant_only_loss": _ANSWERS,
    "completion_only_loss": _ANSWERS,
    "chat_template_path": ("data.chat_template", _text),
    **dict.fromkeys(("dataset_text_field", "dataset_kwargs", "formatting_func", "remove_unused_columns"), _ROWS),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo"), _HUB),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), _SHARDED),
    **dict.fromkeys(("overwrite_output_dir", "resume_from_checkpoint"), _RESUMED),
}
"""Of TrainingArguments and SFTConfig."""

_MODEL: Final = ("argument 1", "model", "model_name", "pretrained_model_name_or_path")
TRAINER: Final[dict[str, Entry]] = {
    **TRAINING,
    **dict.fromkeys(_MODEL, ("model.base", _text)),
    **dict.fromkeys(("train_dataset", "eval_dataset"), f"{_ROWS}; data.val takes rows for validation"),
    **dict.fromkeys(("tokenizer", "processing_class"), "the base's own tokenizer is used, or data.tokenizer"),
}
"""Of SFTTrainer; earlier versions of TRL gave it some of SFTConfig's arguments."""

_LORA: Final = (
    "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "init_lora_weights", "bias", "task_type",
)  # fmt: skip
LORA: Final[dict[str, Entry]] = {
    "r": ("model.lora.r", _whole),
    **{key: (f"model.lora.{key}", lambda value: value) for key in _LORA},
    "inference_mode": ("model.lora", {False: None}),
}
"""Of LoraConfig, whose names ``model.lora`` has."""

_BITS: Final[dict[str, Entry]] = {
    "load_in_4bit": ("model.quantization", {True: "nf4", False: None}),
    "load_in_8bit": ("model.quantization", {True: "int8", False: None}),
    "bnb_4bit_quant_type": ("model.quantization", {"nf4": None}),
    "bnb_4bit_use_double_quant": ("model.quantization", {True: None}),
    **dict.fromkeys(("bnb_4bit_compute_dtype", "torch_dtype", "dtype"), "model.dtype follows bf16 and fp16"),
}
MODEL: Final[dict[str, Entry]] = {
    **dict.fromkeys(_MODEL, ("model.base", _text)),
    **_BITS,
    "revision": ("model.revision", _text),
    "max_seq_length": TRAINING["max_seq_length"],
    "attn_implementation": "model.attn_implementation: auto takes the fastest kernel that is there",
    "use_cache": "a cache is never used in training, and always in generation",
    "trust_remote_code": "transformers' own Phi3ForCausalLM is loaded",
    "device_map": "trainer.accelerator and trainer.devices",
}
"""Of a model's from_pretrained."""

_LOADERS: Final = ("AutoModelForCausalLM", "Phi3ForCausalLM", "FastLanguageModel")
CALLS: Final[tuple[tuple[tuple[str, ...], Mapping[str, Entry]], ...]] = (
    (tuple(f"{name}.from_pretrained" for name in _LOADERS), MODEL),
    (("AutoTokenizer.from_pretrained",), dict.fromkeys(_MODEL, ("data.tokenizer", _text))),
    (("BitsAndBytesConfig",), _BITS),
    (("set_seed",), dict.fromkeys(("argument 1", "seed"), ("seed_everything", _whole))),
    (("TrainingArguments", "SFTConfig", "training_config"), TRAINING),
    (("SFTTrainer",), TRAINER),
    (("LoraConfig", "FastLanguageModel.get_peft_model", "peft_config"), LORA),
)
"""Calls and dictionaries of one meaning, and the table of their arguments."""
