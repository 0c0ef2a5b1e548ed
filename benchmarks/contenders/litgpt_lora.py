"""LitGPT's LoRA fine-tuning, through its own ``setup``.

Its adapters are one for each of q, k, v, gate and up instead of one for each fused layer, and its precision
``bf16-true`` keeps them in bfloat16 too: both are how LitGPT works.
"""

import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.data.base import get_sft_collate_fn
from litgpt.finetune import lora
from litgpt.scripts.convert_hf_checkpoint import copy_weights_phi
from litgpt.utils import save_config
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from contenders.clock import Clock
from contenders.task import TARGETS, Row, Task


def shapes(base: Path) -> Config:
    """Return LitGPT's description of a Phi-3 of any size."""
    given = json.loads((base / "config.json").read_text())
    rope = given.get("rope_parameters") or {"rope_theta": given.get("rope_theta", 10000.0)}
    return Config.from_name(
        "Phi-3-mini-4k-instruct",
        padded_vocab_size=given["vocab_size"],
        vocab_size=given["vocab_size"],
        block_size=given["max_position_embeddings"],
        n_layer=given["num_hidden_layers"],
        n_embd=given["hidden_size"],
        n_head=given["num_attention_heads"],
        n_query_groups=given["num_key_value_heads"],
        head_size=given["hidden_size"] // given["num_attention_heads"],
        intermediate_size=given["intermediate_size"],
        norm_eps=given["rms_norm_eps"],
        rope_base=int(rope["rope_theta"]),
        sliding_window_size=given.get("sliding_window"),
    )


def convert(base: Path, folder: Path) -> None:
    """Write a Phi-3 in LitGPT's format, by LitGPT's own mapping of names; tied weights become two."""
    config = shapes(base)
    weights: dict[str, Tensor] = {}
    for path in sorted(base.glob("*.safetensors")):
        copy_weights_phi(config, defaultdict(dict), weights, load_file(path))
    weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "lit_model.pth")
    save_config(config, folder)
    for path in base.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())


class Rows(DataModule):
    """Ready tokens in LitGPT's batches."""

    def __init__(self, rows: list[Row], task: Task, clock: Clock) -> None:
        counts = [{"raw": len(row.input_ids), "raw_plus_prompt_template": len(row.input_ids)} for row in rows]
        self.rows = [
            {"input_ids": torch.tensor(row.input_ids), "labels": torch.tensor(row.labels), "token_counts": count}
            for row, count in zip(rows, counts, strict=True)
        ]
        self.pad = task.pad
        self.clock = clock
        self.prompt_style = None

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        collate = get_sft_collate_fn(pad_id=self.pad)

        def counted(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            batch = collate(samples)
            self.clock.count(batch["input_ids"], batch["labels"])
            return batch

        return DataLoader(self.rows, batch_size=self.batch_size, collate_fn=counted)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows[:1], collate_fn=get_sft_collate_fn(pad_id=self.pad))  # it looks at one before


def run(task: Task, options: dict[str, Any], clock: Clock) -> None:
    """Train with ``options``: arguments of LitGPT's ``setup``."""
    folder = Path(task.out)
    convert(Path(task.base), folder / "base")
    # what it writes besides the adapter needs its own command line and a merged copy of the base
    lora.merge_lora = lora.save_hyperparameters = lora.save_prompt_style = lambda *_, **__: None
    constant = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda _: 1.0)
    lora.get_lr_scheduler = lambda optimizer, **_: constant(optimizer)
    lora.setup(
        checkpoint_dir=folder / "base",
        out_dir=folder / "run",
        precision="bf16-true",
        lora_r=task.r,
        lora_alpha=task.alpha,
        lora_dropout=task.dropout,
        **{f"lora_{name}": True for name in ("query", "key", "value", "projection", "mlp")},
        data=Rows(task.read(), task, clock),
        train=TrainArgs(
            save_interval=None,
            global_batch_size=task.micro_batch * task.accumulate,
            micro_batch_size=task.micro_batch,
            lr_warmup_steps=0,
            epochs=1_000,
            max_steps=task.steps,
        ),
        eval=EvalArgs(interval=1_000_000, max_new_tokens=1, max_iters=1, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": task.lr, "weight_decay": 0.0}},
        seed=task.seed,
        **options,
    )
    state = torch.load(folder / "run" / "final" / "lit_model.pth.lora", weights_only=True)["model"]
    write_peft(state, shapes(Path(task.base)), task)


def write_peft(state: dict[str, Tensor], config: Config, task: Task) -> None:
    """Write LitGPT's adapters as PEFT's: those of a fused layer's parts side by side, as one of higher rank."""
    heads, groups = config.n_head * config.head_size, config.n_query_groups * config.head_size
    tensors: dict[str, Tensor] = {}
    for layer in range(config.n_layer):
        of = _of_layer(state, layer)
        qkv = of["attn.qkv.lora_B"].float().split([heads, groups, groups])
        gate_up = [of[f"mlp.fc_{part}.lora_B"].float() for part in (1, 2)]
        down_a = torch.cat([of[f"mlp.fc_{part}.lora_A"] for part in (1, 2)])
        pairs = {
            "self_attn.qkv_proj": (of["attn.qkv.lora_A"], torch.block_diag(*qkv)),
            "self_attn.o_proj": (of["attn.proj.lora_A"], of["attn.proj.lora_B"]),
            "mlp.gate_up_proj": (down_a, torch.block_diag(*gate_up)),
            "mlp.down_proj": (of["mlp.proj.lora_A"], of["mlp.proj.lora_B"]),
        }
        for name, (a, b) in pairs.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = a.float().contiguous()
            tensors[f"{prefix}.lora_B.weight"] = b.float().contiguous()
    parts = {"qkv_proj": 3, "gate_up_proj": 2}
    written = LoraConfig(
        task_type="CAUSAL_LM",
        r=task.r,
        lora_alpha=task.alpha,
        rank_pattern={name: count * task.r for name, count in parts.items()},
        alpha_pattern={name: count * task.alpha for name, count in parts.items()},
        target_modules=list(TARGETS),
    )
    written.save_pretrained(task.out)
    save_file(tensors, Path(task.out) / "adapter_model.safetensors", metadata={"format": "pt"})


def _of_layer(state: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    prefix = f"transformer.h.{layer}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
