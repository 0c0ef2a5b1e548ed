"""``preview``: rows as the model will see them, without a model."""

import logging
from typing import Any

from lightning.pytorch import seed_everything
from rich.console import Console

from phi3_lightning.commands.parser import Parser
from phi3_lightning.config.data import Split
from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.data.preview import look, render_terminal
from phi3_lightning.data.preview_html import render_html
from phi3_lightning.errors import ConfigError
from phi3_lightning.files import local_path, writing

DESCRIPTION = "Show rows as the model will see them: trained tokens, special tokens, lengths, statistics."


def parser() -> Parser:
    """Return the parser of ``preview``, which takes the configuration of a run as it is."""
    result = Parser(prog="cli.py preview", description=DESCRIPTION)
    result.add_argument("-c", "--config", action="config", help="Configuration of a run, or a part of one.")
    result.add_lightning_class_args(ChatDataModule, "data")
    result.add_argument("--model", type=dict[str, Any], default={}, help="base and revision name the tokenizer.")
    result.add_argument("--seed_everything", type=int | bool, default=42, help="Decides the split.")
    result.add_argument("--split", type=Split, default="train", help="Which rows.")
    result.add_argument("--rows", type=int, default=3, help="How many of them to show.")
    result.add_argument("--ids", type=bool, default=False, help="Show token ids.")
    result.add_argument("--html", type=str | None, default=None, help="Write one self-contained page to this file.")
    result.accept_rest_of_run()
    return result


def main(args: list[str]) -> None:
    """Run the command.

    Args:
        args: The arguments after ``preview``.

    Raises:
        ConfigError: If the split has no data, or rows cannot be shown.
        DataError: If the data cannot be used.
    """
    options = parser()
    config = options.parse_args(args)
    if config.rows < 1:
        raise ConfigError(f"--rows: {config.rows} cannot be shown: give 1 or more")
    page = None if config.html is None else local_path("--html", config.html)
    if config.data.tokenizer is None:
        config.data.tokenizer = config.model.get("base")
        config.data.revision = config.model.get("revision")
    seed_everything(None if config.seed_everything is True else config.seed_everything, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the statistics are shown below
    data: ChatDataModule = options.instantiate_classes(config).data
    data.prepare_data()
    data.setup({"train": "fit", "val": "fit", "test": "test", "predict": "predict"}[config.split])
    if config.split not in data.plans:
        raise ConfigError(f"--split: there is no {config.split} data; give data.{config.split}")
    data.setup()  # of the other splits too, which may share rows with this one
    preview = look(data, config.split, config.rows)
    console = Console()
    console.print(render_terminal(preview, show_ids=config.ids, brackets=not console.is_terminal))
    if page is not None:
        with writing(page):
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(render_html(preview, show_ids=config.ids), encoding="utf-8")
        print(f"page: {page}")
