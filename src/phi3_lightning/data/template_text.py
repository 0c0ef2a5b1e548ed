"""The text of a chat template: read from a file, and searched for tools."""

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
    """The tag around the assistant's text that transformers adds to Jinja."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_ENVIRONMENT: Final = Environment(extensions=[_Generation, loopcontrols], autoescape=False)


def read_template(name: str) -> str:
    """Return the chat template in a file, without a byte order mark, and with line feeds as ends of lines.

    Raises:
        ConfigError: If the file cannot be read, or holds no Jinja template.
    """
    if "{%" in name or "{{" in name:
        raise ConfigError("data.chat_template: this is the text of a template; write it into a file, and name the file")
    text = _read(Path(name).expanduser()).replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise ConfigError(f"data.chat_template: {name} is empty; leave it out to use the tokenizer's own")
    if _is_json(text):
        raise ConfigError(f"data.chat_template: {name} is JSON; give a file that holds only its template")
    try:
        _ENVIRONMENT.parse(text)
    except TemplateSyntaxError as error:
        fault = f"{name}:{error.lineno}: not a Jinja template ({error.message}); correct it there"
        raise ConfigError(f"data.chat_template: {fault}") from None
    return text


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except IsADirectoryError:
        fault = f"{path} is a folder; name the file in it, such as chat_template.jinja"
        raise ConfigError(f"data.chat_template: {fault}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.chat_template: cannot read {path} ({error}); give a file with a template") from error
    if encoding := wide_encoding(data):
        command = convert(path, f"iconv -f {encoding} -t UTF-8")
        raise ConfigError(f"data.chat_template: {path} is {encoding}, not UTF-8: {command}")
    try:
        return decode_text(data, path)
    except DataError as error:
        raise ConfigError(f"data.chat_template: {error}") from None


def _is_json(text: str) -> bool:
    """Whether a file is a tokenizer's configuration, whose other text would be in every chat."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def templates_of(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the texts of a tokenizer's chat templates; it may have several for different uses."""
    template = tokenizer.chat_template or {}
    return list(template.values()) if isinstance(template, dict) else [template]


def writes_tools(template: str) -> bool:
    """Whether a template reads ``tools`` or ``tool_calls``, of the chat or of a message, or knows the role ``tool``."""
    tree = _ENVIRONMENT.parse(template)
    words = {name.name for name in tree.find_all(nodes.Name)} | {item.attr for item in tree.find_all(nodes.Getattr)}
    constants = (constant.value for constant in tree.find_all(nodes.Const))
    return not _TOOL_WORDS.isdisjoint(words | {value for value in constants if isinstance(value, str)})
