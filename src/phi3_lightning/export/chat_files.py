"""What a folder needs besides weights so that answers come out right: tokenizer, template, stop tokens."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_lightning.export.base_files import fetch

COPIED = ("tokenizer.json", "tokenizer.model", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja")
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Chat:
    """How the model was talked to in training.

    Args:
        tokenizer: Folder or hub id of the tokenizer.
        revision: Its branch, tag or commit on the hub.
        template: The Jinja text of a template that is not the tokenizer's own; None: its own.
        stop_ids: The tokens that end an answer.
        prompts: Token ids of prompts to compare models on.
    """

    tokenizer: str
    revision: str | None
    template: str | None
    stop_ids: list[int]
    prompts: list[list[int]]


def write_tokenizer(chat: Chat, folder: Path, *, bare: bool) -> None:
    """Copy the tokenizer's files, so that ``AutoTokenizer`` reads them right.

    Left as they are in a folder without a config.json, Llama's class would be made of them, which replaces the
    normaliser: other ids for every text. Beside a config.json the class stays the base's, which converters look at.

    Args:
        chat: The tokenizer, and a template if it is not its own.
        folder: Where to.
        bare: Whether the folder gets no config.json.
    """
    source = fetch(chat.tokenizer, chat.revision, [*COPIED, TOKENIZER_CONFIG])
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    path = source / TOKENIZER_CONFIG
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if bare or "tokenizer_class" not in config:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("auto_map", None)  # code of the repository, which nothing needs
    if chat.template is not None:
        config.pop("chat_template", None)
        (folder / "chat_template.jinja").write_text(chat.template, encoding="utf-8")
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def write_generation_config(chat: Chat, base: Path, model: dict[str, Any], folder: Path) -> None:
    """Write the base's generation defaults, with every token that ends an answer.

    Args:
        chat: The stop tokens.
        base: The folder of the base's files.
        model: The model's configuration.
        folder: Where to.
    """
    path = base / GENERATION_CONFIG
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in ("bos_token_id", "pad_token_id"):
        if model.get(name) is not None:
            config.setdefault(name, model[name])
    before = config.get("eos_token_id", model.get("eos_token_id"))
    ends = [*chat.stop_ids, *(before if isinstance(before, list) else [] if before is None else [before])]
    config |= {"eos_token_id": list(dict.fromkeys(ends)), "use_cache": True}
    (folder / GENERATION_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
