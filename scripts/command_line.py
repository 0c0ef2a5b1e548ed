"""The command line as far as its parsers: what they say and accept, without running anything."""

import io
import os
from contextlib import redirect_stdout
from functools import cache
from typing import Any
from unittest.mock import patch

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from phi3_lightning.cli import COMMANDS, Phi3CLI


class _Built(Exception):  # noqa: N818  # it is no error
    """Leaves the command line when its parser is there."""


class _ParserAlone(Phi3CLI):
    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        raise _Built(parser)


@cache
def _parser(command: str) -> LightningArgumentParser:
    try:
        _ParserAlone([command])
    except _Built as built:
        return built.args[0]
    raise AssertionError("the command line ran")


def parse(arguments: list[str]) -> Namespace:
    """Parse a command line of any command.

    Args:
        arguments: What follows ``python cli.py``.

    Returns:
        The options.

    Raises:
        SystemExit: Where the command line would refuse them; what is wrong is on stderr.
    """
    command, *options = arguments
    if command in COMMANDS:
        return COMMANDS[command].parser().parse_args(options)
    return _parser(command).parse_args(arguments)[command]


def help_of(command: str) -> str:
    """Return what ``python cli.py COMMAND --help`` prints, the text of each option on one line.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
    """
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), patch.dict(os.environ, COLUMNS="100000"):
            _parser(command).parse_args([command, "--help"])
    except SystemExit:
        pass
    return printed.getvalue()
