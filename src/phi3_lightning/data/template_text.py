"""The text of a chat template: read from a file, and looked through for what it says about tools."""

import json
from pathlib import Path
from typing import Final

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerFast

from phi3_lightning.data.decoding import convert, decode_text, wide_encoding
from phi3_lightning.errors import ConfigError, DataError

_TOOL_WORDS: Final = {"tools", "tool_calls", "tool"}  # a variable, keys of messages, and a role


class _Generation(Extension):
    """The tag that transformers adds to Jinja, which marks what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_ENVIRONMENT: Final = Environment(extensions=[_Generation, loopcontrols], autoescape=False)


def read_template(name: str) -> str:
    """Read a file with a chat template.

    Args:
        name: The file.

    Returns:
        Its text, without a byte order mark, and with line feeds as ends of lines.

    Raises:
        ConfigError: It cannot be read, or holds no Jinja template.
    """
    if "{%" in name or "{{" in name:
        raise ConfigError("data.chat_template: the text of a template is given; write it into a file, and name that.")
    text = _read(Path(name).expanduser()).replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise ConfigError(f"data.chat_template: {name} is empty; leave it out to use the tokenizer's own.")
    if _is_json(text):
        raise ConfigError(f"data.chat_template: {name} is JSON; give a file with the text of its template alone.")
    try:
        _ENVIRONMENT.parse(text)
    except TemplateSyntaxError as error:
        fault = f"{name}:{error.lineno}: not a Jinja template ({error.message}); mend it there."
        raise ConfigError(f"data.chat_template: {fault}") from None
    return text


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except IsADirectoryError:
        fault = f"{path} is a folder; name the file in it, such as chat_template.jinja."
        raise ConfigError(f"data.chat_template: {fault}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.chat_template: cannot read {path} ({error}); give a file with a template.") from error
    if encoding := wide_encoding(data):
        command = convert(path, f"iconv -f {encoding} -t UTF-8")
        raise ConfigError(f"data.chat_template: {path} is {encoding}, not UTF-8: {command}")
    try:
        return decode_text(data, path)
    except DataError as error:
        raise ConfigError(f"data.chat_template: {error}") from None


def _is_json(text: str) -> bool:
    """Whether a file is a tokenizer's configuration, which holds a template: its other text would be in every chat."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def templates_of(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return a tokenizer's chat templates, of which it may have several for different uses.

    Args:
        tokenizer: The tokenizer.

    Returns:
        Their texts.
    """
    template = tokenizer.chat_template
    return list(template.values()) if isinstance(template, dict) else [] if template is None else [template]


def writes_tools(template: str) -> bool:
    """Whether a template has a way of its own to write tools, their calls or their results.

    Args:
        template: Its text.

    Returns:
        True where it reads ``tools`` or ``tool_calls``, of the chat or of a message, or knows the role ``tool``.
    """
    tree = _ENVIRONMENT.parse(template)
    words = {name.name for name in tree.find_all(nodes.Name)} | {item.attr for item in tree.find_all(nodes.Getattr)}
    constants = (constant.value for constant in tree.find_all(nodes.Const))
    return not _TOOL_WORDS.isdisjoint(words | {value for value in constants if isinstance(value, str)})
