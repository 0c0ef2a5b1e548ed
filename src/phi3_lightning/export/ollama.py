"""A Modelfile for Ollama: the base's chat template in Go's template language, and the tokens that end an answer."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, cast

from jinja2 import TemplateError
from lightning.pytorch.utilities import rank_zero_warn
from transformers import Phi3Config, PreTrainedTokenizerFast

from phi3_lightning.errors import ConfigError

MODELFILE = "Modelfile"
ROLES: Final = ("system", "user", "assistant")
START, PROMPT = "start", "generation prompt"

_Turn = tuple[str, str]
"""Role and content of a message."""
_Separators = dict[tuple[str, str], str]
"""The text between the contents of two roles, or before the first and after the last content."""

_PROBES: Final = (
    ("user",), ("user", "assistant"), ("user", "assistant", "user"), ("assistant", "user"), ("system", "user"),
    ("system", "user", "assistant"), ("system", "assistant"),
)  # fmt: skip
_CONTENTS: Final = (
    *("a", "", " outer blanks \n", "two\nlines", '{{ .Content }} {% raw %} {"""} \\n', "<think>a thought</think>b"),
    *("opened by the prompt</think>b", "\N{NO-BREAK SPACE}é日本"),
)
"""Contents that some templates change."""


@dataclass(frozen=True)
class ChatForm:
    """What a chat template writes around the contents, if that depends on the roles alone."""

    start: str
    before: dict[str, str]
    """The text before the content of each role; a role that the template leaves out is absent."""
    after: dict[str, str]
    generation_prompt: str
    skips_empty: frozenset[str] = frozenset()
    """The roles whose messages are left out if they are empty."""

    def render(self, chat: Sequence[_Turn]) -> str:
        """Return a chat as Ollama would write it."""
        turns = [
            f"{self.before[role]}{content}{self.after[role]}"
            for role, content in chat
            if role in self.before and (content or role not in self.skips_empty)
        ]
        return f"{self.start}{''.join(turns)}{self.generation_prompt}"

    def to_go(self) -> str:
        """Return the same as a Go template."""
        branches = ""
        for role in self.before:
            turn = f"{_go_text(self.before[role])}{{{{ .Content }}}}{_go_text(self.after[role])}"
            if role in self.skips_empty:
                turn = f"{{{{ if .Content }}}}{turn}{{{{ end }}}}"
            branches += f'{{{{ {"else if" if branches else "if"} eq .Role "{role}" }}}}{turn}'
        loop = f"{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}"
        return f"{_go_text(self.start)}{loop}{_go_text(self.generation_prompt)}"


def write_modelfile(
    folder: Path,
    stop_ids: Sequence[int],
    gguf: str,
    *,
    adapter_of: str | None = None,
    ollama_from: str | None = None,
    context: int | None = None,
) -> None:
    """Write the Modelfile to a folder with the tokenizer's files, beside a GGUF file.

    A template that the Modelfile cannot express is left out of it, with a warning and a comment.

    Args:
        stop_ids: The tokens that end an answer.
        gguf: The name of the file: a whole model, or an adapter.
        adapter_of: The name of an adapter's base; None if the file is a whole model.
        ollama_from: What FROM names for an adapter; None: a GGUF file of the base, to be put into the folder.
        context: The context length to set, for a longrope model its ``short_context``; None: Ollama's own.

    Raises:
        ConfigError: If ``ollama_from`` cannot be part of a file for others.
    """
    check_ollama_from(ollama_from)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    try:
        form = read_chat_form(tokenizer)
    except ConfigError as error:
        rank_zero_warn(f"{MODELFILE}: no TEMPLATE is written, since {error}; docs/export.md says what Ollama does then")
        template = [
            f"# There is no TEMPLATE, since {error}.",
            "# Ollama then uses the chat template in the GGUF file, or one that it takes for similar: compare answers",
            "# with those of the trained model, and write a TEMPLATE if they differ.",
        ]
    else:
        template = [f'TEMPLATE """{form.to_go()}"""']
        if "system" not in form.before:
            template.insert(0, "# The chat template leaves system messages out, and so does TEMPLATE.")
    stops = [f'PARAMETER stop "{tokenizer.decode([index])}"' for index in dict.fromkeys(stop_ids)]
    if context is not None:
        stops += [
            "# With a larger context llama.cpp takes the rotary factors of long texts for short ones, too.",
            f"PARAMETER num_ctx {context}",
        ]
    lines = [*_sources(gguf, adapter_of, ollama_from), *template, *stops]
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def check_ollama_from(name: str | None) -> None:
    """Refuse a name for FROM that is no name, or says where this machine keeps its files."""
    if name is None:
        return
    if not name.strip() or not name.isprintable():
        raise ConfigError(f"--ollama_from: {name!r} is no name; give a model of Ollama's, such as phi3:3.8b, or a file")
    if Path(name).is_absolute() or name.startswith("~"):
        raise ConfigError(
            f"--ollama_from: {name} is an absolute path, which nobody else has; give a model of Ollama's, such as "
            "phi3:3.8b, or a path relative to the folder of the export"
        )


def short_context(config: Phi3Config) -> int | None:
    """Return up to which length a longrope model has the factors of short texts; None for any other model."""
    rope = cast("dict[str, Any]", config.rope_parameters)
    return int(config.original_max_position_embeddings) if rope.get("rope_type") == "longrope" else None


def _sources(gguf: str, adapter_of: str | None, ollama_from: str | None) -> list[str]:
    if adapter_of is None:
        return [f"FROM ./{gguf}"]
    base = adapter_of.rstrip("/").rpartition("/")[2]
    lines = [
        f"# FROM must be the base of the adapter, {base}, with the same weights.",
        "# Ollama 0.34.1 and later are reported to refuse ADAPTER: export the whole model for them, with --merge.",
    ]
    if ollama_from is None:
        lines.append("# Put the base beside this file, converted by llama.cpp, or name a model of Ollama's.")
    return [*lines, f"FROM {ollama_from or f'./{base}.gguf'}", f"ADAPTER ./{gguf}"]


# ---------------------------------------------------------------------- what the template renders


def read_chat_form(tokenizer: PreTrainedTokenizerFast) -> ChatForm:
    """Find out what a tokenizer's chat template writes around contents, by rendering chats.

    What need not be written is left out: a beginning-of-text token that the tokenizer adds by itself, since llama.cpp
    adds it, too; and white space that the tokenizer drops after its tokens, which llama.cpp keeps for some files.

    Raises:
        ConfigError: If this depends on more than the roles of the messages, or the template changes contents.
    """
    separators = _read_separators(tokenizer)
    form = _solve(separators, tokenizer)
    if form is None:
        raise ConfigError("the chat template writes a message by more than its role")
    empty = {"system": [("system", ""), ("user", "a")], "user": [("user", "")]}
    empty["assistant"] = [("user", "a"), ("assistant", ""), ("user", "a")]
    skipped = {role for role in form.before if _render(tokenizer, empty[role]) != form.render(empty[role])}
    form = replace(form, skips_empty=frozenset(skipped))
    for chat in _examples("system" in form.before):
        if _render(tokenizer, chat) != form.render(chat):
            contents = " and ".join(repr(content) for _, content in chat)
            raise ConfigError(f"the chat template changes contents or leaves them out in a chat of {contents}")
    start, bos = form.start, tokenizer.bos_token
    if bos and start.startswith(bos) and tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
        start = start.removeprefix(bos)
    dropping = "|".join(re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.rstrip)

    def shorten(text: str) -> str:
        return re.sub(rf"({dropping})\s+", r"\1", text) if dropping else text

    return replace(
        form,
        start=shorten(start),
        before={role: shorten(text) for role, text in form.before.items()},
        after={role: shorten(text) for role, text in form.after.items()},
        generation_prompt=shorten(form.generation_prompt),
    )


def _render(tokenizer: PreTrainedTokenizerFast, chat: Sequence[_Turn]) -> str | None:
    messages = [{"role": role, "content": content} for role, content in chat]
    render: Any = tokenizer.apply_chat_template
    try:
        text: str = render(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, KeyError):  # such as a role that the template refuses
        return None
    return text


def _read_separators(tokenizer: PreTrainedTokenizerFast) -> _Separators:
    separators: _Separators = {}
    for roles in _PROBES:
        sentinels = [chr(0xE000 + index) for index in range(len(roles))]  # private characters
        text = _render(tokenizer, list(zip(roles, sentinels, strict=True)))
        parts = None if text is None else re.split(f"[{''.join(sentinels)}]", text)
        if parts is None or len(parts) != len(roles) + 1:
            if roles[0] == "user":
                raise ConfigError("the chat template loses or repeats the content of a message")
            continue  # a role that the template refuses or leaves out, or a beginning
        for pair, part in zip(pairwise((START, *roles, PROMPT)), parts, strict=True):
            if separators.setdefault(pair, part) != part:
                raise ConfigError("the chat template writes a message by its place in the chat")
    return separators


def _solve(separators: _Separators, tokenizer: PreTrainedTokenizerFast) -> ChatForm | None:
    """Divide each separator into what follows one role and what precedes the other.

    One cut decides all: that of the text before a first user message. Cuts before a special token are tried first.
    """
    first = separators[START, "user"]
    tokens = "|".join(re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special)
    natural = [match.start() for match in re.finditer(tokens or r"(?!)", first)]
    for cut in (*reversed(natural), *range(len(first) + 1)):
        after, before = {START: first[:cut]}, {"user": first[cut:]}
        if _propagate(separators, after, before):
            roles = [role for role in ROLES if role in before]
            return ChatForm(
                after[START],
                {role: before[role] for role in roles},
                {role: after[role] for role in roles},
                before[PROMPT],
            )
    return None


def _propagate(separators: _Separators, after: dict[str, str], before: dict[str, str]) -> bool:
    """Derive all texts from the known ones; return whether they agree with all separators."""
    for _ in separators:
        for (left, right), text in separators.items():
            if left in after and right not in before and text.startswith(after[left]):
                before[right] = text[len(after[left]) :]
            elif right in before and left not in after and text.endswith(before[right]):
                after[left] = text[: len(text) - len(before[right])]
    return all(after.get(left, "") + before.get(right, "") == text for (left, right), text in separators.items())


def _examples(with_system: bool) -> Iterator[list[_Turn]]:
    """Chats of all kinds of contents, on which a form is compared with the template."""
    for content in _CONTENTS:
        answered = [("user", content), ("assistant", content)]
        yield [("user", content)]
        yield [*answered, ("user", "a")]
        yield [*answered, *answered]
        if with_system:
            yield [("system", content), ("user", "a")]
            yield [("system", content), *answered, ("user", content)]


# ---------------------------------------------------------------------- Go's template language


def _go_text(text: str) -> str:
    """Write a text for a Go template within three quotes: braces, rows of quotes and invisible characters as strings.

    Ollama's reader of Modelfiles drops what cannot be printed, and ends a value at three quotes.
    """
    return re.sub(r'\{+|"{3,}|[^ -~\n\t]+', _go_string, text)


def _go_string(match: re.Match[str]) -> str:
    text = match[0]
    if text.isprintable() and not text.startswith(("{", '"')):
        return text
    escaped = "".join(
        f"\\{char}" if char == '"' else char if char.isprintable() else f"\\U{ord(char):08x}" for char in text
    )
    return f'{{{{ "{escaped}" }}}}'
