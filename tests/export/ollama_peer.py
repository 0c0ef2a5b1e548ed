"""How Ollama reads a Modelfile and renders a chat: ports of its parser.go and of the part of Go's templates in use."""

import re
from itertools import groupby

ACTION = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)
GO_ESCAPE = re.compile(r'\\(U[0-9a-f]{8}|")')


def _unquote(text: str) -> str | None:
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if closed else None
    return text


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """The instructions of a Modelfile in order; ``PARAMETER stop x`` is ``("stop", "x")``."""
    commands = []
    state, buffer, name = "nil", "", ""
    for char in text + "\n":
        if state == "nil":
            if char == "#":
                state = "comment"
            elif char not in " \t\r\n":
                state, buffer = "name", char
        elif state == "comment":
            if char in "\r\n":
                state = "nil"
        elif state in ("name", "parameter"):
            if char in " \t":
                name = buffer.lower()
                state, buffer = ("parameter" if name == "parameter" else "value"), ""
            else:
                buffer += char
        elif char in " \t\r\n":
            value = _unquote(buffer.strip())
            if value is None or char in " \t":
                buffer += char
            else:
                commands.append((name, value))
                state, buffer = "nil", ""
        elif char.isprintable():  # all else is dropped
            buffer += char
    assert state == "nil", f"the Modelfile ends within a value: {buffer}"
    assert any(name == "from" for name, _ in commands)
    return commands


def collate(chat: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Join the messages of one role that follow each other, as Ollama does."""
    return [
        (role, "\n\n".join(content for _, content in group)) for role, group in groupby(chat, key=lambda turn: turn[0])
    ]


def render_go(template: str, chat: list[tuple[str, str]]) -> str:
    """Render a chat by a template of text, strings, range, if, eq, .Role and .Content, and of nothing else."""
    parts = ACTION.split(template)
    assert not any("{{" in text or text.endswith("{") for text in parts[::2]), "braces that Go reads as an action"
    text, position = _block(parts, 0, collate(chat), None)
    assert position == len(parts), "an end without a beginning"
    return text


def _block(parts: list[str], position: int, chat: list, message: tuple[str, str] | None) -> tuple[str, int]:
    """Render until the end of a block; return the text and the position of the action that ends it."""
    written = parts[position]
    position += 1
    while position < len(parts):
        action = parts[position]
        if action == "end" or action.startswith("else"):
            return written, position
        if action == "range .Messages":
            assert message is None
            for turn in chat:
                text, end = _block(parts, position + 1, chat, turn)
                written += text
            position = end
        elif action.startswith("if "):
            text, position = _branches(parts, position, chat, message)
            written += text
        else:
            written += _value(action, message)
        written += parts[position + 1]
        position += 2
    return written, position


def _branches(parts: list[str], position: int, chat: list, message: tuple[str, str] | None) -> tuple[str, int]:
    written, done = "", False
    while parts[position] != "end":
        action = parts[position].removeprefix("else").strip()
        holds = not action or _condition(action, message)
        text, position = _block(parts, position + 1, chat, message)
        if holds and not done:
            written, done = text, True
    return written, position


def _condition(action: str, message: tuple[str, str] | None) -> bool:
    role, content = message
    if equal := re.fullmatch(r'if eq \.Role "(\w+)"', action):
        return role == equal[1]
    assert action == "if .Content", f"beyond the subset: {action}"
    return content != ""


def _value(action: str, message: tuple[str, str] | None) -> str:
    if action.startswith('"'):
        assert re.fullmatch(r'"(?:[^"\\\n]|\\U[0-9a-f]{8}|\\")*"', action), f"no string of Go's: {action}"
        return GO_ESCAPE.sub(lambda found: '"' if found[1] == '"' else chr(int(found[1][1:], 16)), action[1:-1])
    role, content = message
    assert action in (".Role", ".Content"), f"beyond the subset: {action}"
    return role if action == ".Role" else content
