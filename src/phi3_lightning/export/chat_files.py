"""The files besides weights that a chat needs: tokenizer, template, stop tokens."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_lightning.export.base_files import fetch

COPIED = ("tokenizer.json", "tokenizer.model", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja")
TOKENIZER_CONFIG = "tokenizer_config.json"
LOCAL = ("name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file", "merges_file", "cache_dir")
"""Keys of earlier releases of transformers, with paths on the machine that saved the tokenizer."""
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Chat:
    """The chat format of the training."""

    tokenizer: str
    """Folder or hub id of the tokenizer."""
    revision: str | None
    """Its branch, tag or commit on the hub."""
    template: str | None
    """The Jinja text of a template that is not the tokenizer's own; None: its own."""
    stop_ids: list[int]
    """The tokens that end an answer."""
    prompts: list[list[int]]
    """Token ids of prompts to compare models on."""


def write_tokenizer(chat: Chat, folder: Path, *, bare: bool) -> None:
    """Copy the tokenizer's files, so that ``AutoTokenizer`` reads them right.

    In a ``bare`` folder, without a config.json, transformers would make Llama's class of them, which replaces the
    normaliser: other ids for every text. Beside a config.json the class stays the base's, which converters read.
    """
    source = fetch(chat.tokenizer, chat.revision, [*COPIED, TOKENIZER_CONFIG])
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    path = source / TOKENIZER_CONFIG
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if bare or "tokenizer_class" not in config:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("auto_map", *LOCAL):  # the first is code of the repository, which nothing needs
        config.pop(key, None)
    if chat.template is not None:
        config.pop("chat_template", None)
        (folder / "chat_template.jinja").write_text(chat.template, encoding="utf-8")
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def write_generation_config(chat: Chat, base: Path, folder: Path) -> None:
    """Write the generation defaults of the base in a folder, with every token that ends an answer."""
    model: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    path = base / GENERATION_CONFIG
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in ("bos_token_id", "pad_token_id"):
        if model.get(name) is not None:
            config.setdefault(name, model[name])
    default = config.get("eos_token_id", model.get("eos_token_id"))
    ends = [*chat.stop_ids, *(default if isinstance(default, list) else [] if default is None else [default])]
    config |= {"eos_token_id": list(dict.fromkeys(ends)), "use_cache": True}
    (folder / GENERATION_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
