"""LLaMA-Factory's supervised fine-tuning, through its own arguments and workflow."""

import importlib.machinery
import json
import os
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["DISABLE_VERSION_CHECK"] = "1"  # it pins older releases of transformers, PEFT and datasets
_absent = types.ModuleType("torchaudio")  # imported, and used for sound alone
_absent.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
sys.modules.setdefault("torchaudio", _absent)

from llamafactory.data.processor import supervised  # noqa: E402
from llamafactory.hparams import get_train_args  # noqa: E402
from llamafactory.model.model_utils import checkpointing  # noqa: E402
from llamafactory.train.sft import workflow  # noqa: E402

from contenders.clock import Clock  # noqa: E402
from contenders.hf_trainer import arguments  # noqa: E402
from contenders.task import TARGETS, Row, Task  # noqa: E402


def give_rows(rows: list[Row], folder: Path) -> None:
    """Let its processors, which pack and collate, take ready tokens: a chat here is the number of its row."""
    chats = [
        {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "."}]}
        for i in range(len(rows))
    ]
    (folder / "chats.json").write_text(json.dumps(chats))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    described = {
        "file_name": "chats.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": tags,
    }
    (folder / "dataset_info.json").write_text(json.dumps({"chats": described}))

    def encode(_processor: Any, prompt: list[dict[str, str]], **__: Any) -> tuple[list[int], list[int]]:
        row = rows[int(prompt[0]["content"])]
        return list(row.input_ids), list(row.labels)

    supervised.SupervisedDatasetProcessor._encode_data_example = encode


def find_layers() -> None:
    """Let its checkpointing find the layer that it is called for, which transformers since gives as an argument."""
    original = checkpointing.get_custom_gradient_checkpointing_func

    def custom(function: Callable[..., Any]) -> Callable[..., Any]:
        checkpointed = original(function)

        def call(forward: partial, *args: Any) -> Any:
            layer, *others = forward.args
            bound = partial(types.MethodType(forward.func, layer), *others, **forward.keywords)
            return checkpointed(bound, *args)

        return call

    checkpointing.get_custom_gradient_checkpointing_func = custom


def run(task: Task, options: dict[str, Any], clock: Clock) -> None:
    """Train with ``options``: LLaMA-Factory's own keys."""
    folder = Path(task.out)
    give_rows(task.read(), folder)
    find_layers()
    model, data, training, finetuning, generating = get_train_args(
        {
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "model_name_or_path": task.base,
            "template": "empty",
            "dataset": "chats",
            "dataset_dir": str(folder),
            "cutoff_len": task.row_tokens,
            "lora_rank": task.r,
            "lora_alpha": task.alpha,
            "lora_dropout": task.dropout,
            "lora_target": ",".join(TARGETS),
        }
        | arguments(task, packed=options.get("packing", False))
        | options
    )
    load = workflow.load_model

    def watched(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        clock.watch(loaded)
        return loaded

    workflow.load_model = watched
    workflow.run_sft(model, data, training, finetuning, generating)
