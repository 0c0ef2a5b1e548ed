"""What the arguments of TRL, PEFT, transformers and datasets are called here."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

from phi3_lightning.config import LoRA

_ADAMW: Final = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "paged_adamw_32bit")
_SCHEDULES: Final = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}

TABLE: Final[dict[str, tuple[str, type | Mapping[Any, Any]]]] = {
    "output_dir": ("run", str),
    "num_train_epochs": ("trainer.max_epochs", int),
    "max_steps": ("trainer.max_steps", int),
    "per_device_train_batch_size": ("data.batch_size", int),
    "gradient_accumulation_steps": ("trainer.accumulate_grad_batches", int),
    "auto_find_batch_size": ("data.max_tokens_per_batch", {True: "auto", False: None}),
    "learning_rate": ("model.optimizer.lr", float),
    "weight_decay": ("model.optimizer.weight_decay", float),
    "adam_epsilon": ("model.optimizer.eps", float),
    "optim": ("model.optimizer.name", dict.fromkeys(_ADAMW, "adamw") | {"paged_adamw_8bit": "paged_adamw_8bit"}),
    "lr_scheduler_type": ("model.schedule.name", _SCHEDULES),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), ("model.schedule.warmup", float)),
    "max_grad_norm": ("trainer.gradient_clip_val", float),
    "bf16": ("trainer.precision", {True: "bf16-mixed"}),
    "fp16": ("trainer.precision", {True: "16-mixed", False: None}),
    "gradient_checkpointing": ("model.gradient_checkpointing", {True: "full", False: "none"}),
    "neftune_noise_alpha": ("model.neftune_noise_alpha", float),
    "seed": ("seed_everything", int),
    "data_seed": ("data.seed", int),
    "logging_steps": ("trainer.log_every_n_steps", int),
    "report_to": ("trainer.logger", {"none": False, "tensorboard": None}),
    "save_steps": ("checkpoint.every_n_steps", int),
    "metric_for_best_model": ("checkpoint.monitor", {"loss": "val/loss", "eval_loss": "val/loss"}),
    "greater_is_better": ("checkpoint.mode", {True: "max", False: "min"}),
    **dict.fromkeys(("evaluation_strategy", "eval_strategy"), ("data.val_fraction", {"no": 0.0, "epoch": None})),
    "eval_steps": ("trainer.val_check_interval", int),
    "dataloader_num_workers": ("data.num_workers", int),
    "dataset_num_proc": ("data.num_proc", int),
    **dict.fromkeys(("max_length", "max_seq_length"), ("data.max_length", int)),
    "packing": ("data.packing", {True: True, False: False}),
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss"), ("data.train_on", {True: "assistant"})),
    "chat_template_path": ("data.chat_template", str),
    **dict.fromkeys(("model", "model_name"), ("model.base", str)),
    "tokenizer": ("data.tokenizer", str),
    "load_in_4bit": ("model.quantization", {True: "nf4", False: None}),
    "load_in_8bit": ("model.quantization", {True: "int8", False: None}),
    "bnb_4bit_quant_type": ("model.quantization", {"nf4": None}),
    "bnb_4bit_use_double_quant": ("model.quantization", {True: None}),
    **{field.name: (f"model.lora.{field.name}", object) for field in fields(LoRA)},  # PEFT's names
    "DPOConfig.loss_type": ("model.objective.name", {"sigmoid": "dpo", "robust": "dpo", "ipo": "ipo"}),
    "KTOConfig.loss_type": ("model.objective.name", {"kto": "kto"}),
    "ORPOConfig.loss_type": ("model.objective.name", {"orpo": "orpo"}),  # which is implied
    "CPOConfig.loss_type": ("model.objective.name", {"simpo": "simpo"}),
    "DPOConfig.label_smoothing": ("model.objective.label_smoothing", float),
    **{
        key: (f"model.objective.{key}", float)
        for key in ("beta", "simpo_gamma", "desirable_weight", "undesirable_weight")
    },
    "cpo_alpha": ("model.objective.sft_weight", float),
    "disable_dropout": ("model.lora.lora_dropout", {True: None, False: None}),  # 0 unless it is false
}
"""The option that an argument sets, and its type or the option's value for each of its values (None: as it is).

A key may name its call; then it stands for that call's argument alone.
"""

LOSSES: Final = {"DPOConfig": "sigmoid", "KTOConfig": "kto", "ORPOConfig": "orpo", "CPOConfig": "sigmoid"}
"""TRL's preference trainers: the configuration of each, and its ``loss_type`` by default."""

CALLS: Final = {
    **dict.fromkeys(("TrainingArguments", "SFTConfig", *LOSSES), "output_dir"),
    **dict.fromkeys(("SFTTrainer", "DPOTrainer", "KTOTrainer", "ORPOTrainer", "CPOTrainer"), "model"),
    "FastLanguageModel.get_peft_model": "model",
    "LoraConfig": "argument 1",
    "BitsAndBytesConfig": "load_in_8bit",
    **{f"{name}.from_pretrained": "model" for name in ("AutoModelForCausalLM", "Phi3ForCausalLM", "FastLanguageModel")},
    "AutoTokenizer.from_pretrained": "tokenizer",
    "load_dataset": "path",
    "set_seed": "seed",
}
"""The calls that are read, and the key of the first argument of each."""
