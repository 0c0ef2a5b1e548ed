"""``preview``: rows as the model will see them, without loading the model."""

from rich.console import Console

from phi3_lightning.commands.parser import Parser, command_parser, prepare
from phi3_lightning.commands.quiet import quieten_trainers
from phi3_lightning.config.data import Split
from phi3_lightning.data.datamodule import ChatDataModule
from phi3_lightning.data.preview import build_preview, render_html, render_terminal
from phi3_lightning.errors import ConfigError
from phi3_lightning.files import local_path, writing

DESCRIPTION = "Show rows as the model will see them: trained tokens, special tokens, lengths, statistics."


def parser() -> Parser:
    """Return the parser of ``preview``, which takes the configuration of a run as it is."""
    result = command_parser("preview", DESCRIPTION, {"data": ChatDataModule}, {"model": "base and revision"})
    result.add_argument("--split", type=Split, default="train", help="Which rows.")
    result.add_argument("--rows", type=int, default=3, help="How many of them to show.")
    result.add_argument("--ids", type=bool, default=False, help="Show token ids.")
    result.add_argument("--html", type=str | None, default=None, help="Write one self-contained page to this file.")
    result.accept_rest_of_run()
    return result


def main(args: list[str]) -> None:
    """Run the command with the arguments after ``preview``."""
    options = parser()
    config = options.parse_args(args)
    if config.rows < 1:
        raise ConfigError(f"--rows: {config.rows} cannot be shown: give 1 or more")
    page = None if config.html is None else local_path("--html", config.html)
    prepare(config)
    quieten_trainers()
    data: ChatDataModule = options.instantiate_classes(config).data
    data.prepare_data()
    data.setup({"train": "fit", "val": "fit", "test": "test", "predict": "predict"}[config.split])
    if config.split not in data.plans:
        raise ConfigError(f"--split: there is no {config.split} data; give data.{config.split}")
    data.setup()  # of the other splits too, which may share rows with this one
    preview = build_preview(data, config.split, config.rows)
    console = Console()
    console.print(render_terminal(preview, show_ids=config.ids, brackets=not console.is_terminal))
    if page is not None:
        with writing(page):
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(render_html(preview, show_ids=config.ids), encoding="utf-8")
        print(f"page: {page}")
